from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.unroll import batches, replay
from flpriv.errors import FlprivError, UpdateError
from flpriv.recipe import LocalRecipe
from flpriv.state import add, norm

RECIPES = {
    "one step": LocalRecipe(lr=0.1, batch_size=4, steps=1, train_mode=False),
    "four steps": LocalRecipe(lr=0.1, batch_size=1, steps=4, train_mode=False),
    "momentum and decay": LocalRecipe(lr=0.05, batch_size=2, steps=2, momentum=0.9, weight_decay=0.02, train_mode=False),
    "a short last batch": LocalRecipe(lr=0.05, batch_size=3, epochs=1),
    "epochs of one batch": LocalRecipe(lr=0.05, batch_size=8, epochs=3, train_mode=False),
}


ADAM = {
    "one step": LocalRecipe(optimizer="adam", lr=0.001, batch_size=4, steps=1, train_mode=False),
    "four steps": LocalRecipe(optimizer="adam", lr=0.01, batch_size=1, steps=4, train_mode=False),
    "decay": LocalRecipe(optimizer="adam", lr=0.01, batch_size=2, steps=2, weight_decay=0.1, train_mode=False),
}


@pytest.mark.parametrize("recipe", ADAM.values(), ids=ADAM)
def test_the_replay_of_adam_is_that_of_torch(
    federate: Callable[..., Any], smooth: Callable[..., Any], recipe: LocalRecipe
) -> None:
    done = federate(smooth(4), recipe=recipe)
    (seen,) = done.capture.observations
    site = replay(done.capture.task, seen.sent, recipe=recipe, examples=seen.examples, device=torch.device("cpu"))
    moved = dict(zip(site.start, site(done.used.images, done.used.labels), strict=True))
    apart = {name: -recipe.lr * moved[name] - value for name, value in seen.update.items()}
    assert norm(apart) <= 1e-4 * norm(seen.update)


@pytest.mark.parametrize("model", ["cnn", "resnet18"])
@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_replaying_the_true_images_gives_the_update(
    federate: Callable[..., Any], smooth: Callable[..., Any], recipe: LocalRecipe, model: str
) -> None:
    """Against PyTorch's own optimiser, in the site's real loop."""
    done = federate(smooth(5), recipe=recipe, model=model)
    (seen,) = done.capture.observations
    site = replay(done.capture.task, seen.sent, recipe=recipe, examples=seen.examples, device=torch.device("cpu"))
    moved = dict(zip(site.start, site(done.used.images, done.used.labels), strict=True))
    assert site.images == len(done.used)
    whole = norm(seen.update)
    apart = {name: -recipe.lr * moved[name] - value for name, value in seen.update.items()}
    assert norm(apart) <= 5e-3 * whole + 1e-6
    # Batch statistics over two images magnify float32's rounding within single layers.
    share = 5e-3 if not recipe.train_mode else 0.05
    for name, value in seen.update.items():
        assert torch.linalg.vector_norm(apart[name]) <= share * torch.linalg.vector_norm(value) + 4e-4 * whole + 1e-6, name


def test_the_state_sent_is_left_alone(federate: Callable[..., Any], smooth: Callable[..., Any]) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=2, steps=2)
    done = federate(smooth(4), recipe=recipe, model="resnet18")
    sent = done.capture.observations[0].sent
    before = {key: value.clone() for key, value in sent.items()}
    replay(done.capture.task, sent, recipe=recipe, examples=4, device=torch.device("cpu"))(done.used.images, done.used.labels)
    assert all(torch.equal(sent[key], value) and not sent[key].requires_grad for key, value in before.items())


@pytest.mark.parametrize(
    ("recipe", "examples", "expected"),
    [
        (LocalRecipe(batch_size=2, steps=1), 150, ((0, 1),)),
        (LocalRecipe(batch_size=2, steps=2), None, ((0, 1), (2, 3))),
        (LocalRecipe(batch_size=2, steps=4), 3, ((0, 1), (2,), (0, 1), (2,))),
        (LocalRecipe(batch_size=8, steps=2), 3, ((0, 1, 2), (0, 1, 2))),
        (LocalRecipe(batch_size=2, epochs=2), 3, ((0, 1), (2,), (0, 1), (2,))),
    ],
)
def test_batches(recipe: LocalRecipe, examples: int | None, expected: tuple[tuple[int, ...], ...]) -> None:
    assert batches(recipe, examples=examples) == expected


def test_what_cannot_be_replayed_is_refused(federate: Callable[..., Any], smooth: Callable[..., Any]) -> None:
    done = federate(smooth(1))
    task, sent, cpu = done.capture.task, done.capture.observations[0].sent, torch.device("cpu")
    with pytest.raises(FlprivError, match=r"local\.steps"):
        replay(task, sent, recipe=LocalRecipe(epochs=1), examples=None, device=cpu)
    with pytest.raises(UpdateError, match=r"model sent: layer 'extra'"):
        replay(task, {**sent, "extra": torch.zeros(1)}, recipe=LocalRecipe(steps=1), examples=1, device=cpu)
    with pytest.raises(UpdateError, match=r"layer 'fc\.bias' is missing"):
        replay(task, {k: v for k, v in add(sent, {}).items() if k != "fc.bias"}, recipe=LocalRecipe(), examples=1, device=cpu)
