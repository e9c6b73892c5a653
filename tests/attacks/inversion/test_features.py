from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call

from flpriv.attacks.inversion import features
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.received import answered, received
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
KNOWN = ("know-labels", "know-order")


def evidence(done: Any) -> Evidence:
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    return gather(done.capture, done.capture.observations[0], rng=rng, device=cpu, max_steps=99, max_images=99, who="test")


def of(seen: Evidence, images: Tensor, layer: str = "fc") -> Tensor:
    return torch.cat([inputs[0] for inputs in received(seen.site, images, [layer]).values()])


@pytest.mark.parametrize("model", ["cnn", "lenet", "resnet18"])
def test_one_image_gives_its_features_away(federate: Make, smooth: Make, model: str) -> None:
    done = federate(smooth(1, (1, 16, 16)), model=model, classes=3)
    seen = evidence(done)
    assert features.last_layer(seen.site, classes=3) == "fc"
    mixing, told = features.told("fc")(seen, seen.labels)
    assert torch.allclose(mixing, torch.ones(1, 1), atol=1e-4)
    own = of(seen, done.used.images)
    assert torch.allclose(told, own, atol=1e-3 * float(own.abs().max()))
    penalty = features.apart(seen.site, "fc")
    assert penalty(done.used.images, [mixing, told]).item() < 1e-6 * own.square().mean().item()
    assert penalty(torch.rand(1, 1, 16, 16), [mixing, told]).item() > 1e-3 * own.square().mean().item()


@pytest.mark.parametrize(
    ("recipe", "labels", "classes", "apart"),
    [
        (LocalRecipe(lr=0.01, batch_size=3, steps=1, train_mode=False), 3, 4, 3),
        (LocalRecipe(lr=0.01, batch_size=2, steps=1, train_mode=False), 2, 2, 1),
        (LocalRecipe(lr=0.01, batch_size=4, steps=1, train_mode=False), 2, 4, 2),
        (LocalRecipe(lr=1e-3, batch_size=1, steps=3, momentum=0.5, weight_decay=0.1, train_mode=False), 3, 4, 3),
    ],
    ids=["a class each", "two of two classes", "two of each class", "three steps"],
)
def test_a_batch_gives_away_what_its_labels_tell_apart(
    federate: Make, smooth: Make, recipe: LocalRecipe, labels: int, classes: int, apart: int
) -> None:
    count = recipe.batch_size * (recipe.steps or 1)
    done = federate(smooth(count, labels=labels, seed=1), recipe=recipe, classes=classes, grant=KNOWN)
    seen = evidence(done)
    mixing, told = features.told("fc")(seen, seen.labels)
    assert torch.linalg.matrix_rank(mixing, atol=0.1) == apart
    expected = mixing @ of(seen, done.used.images)
    others = mixing @ of(seen, smooth(count, labels=labels, seed=9).images)
    assert (told - expected).square().mean() < 0.1 * (told - others).square().mean()


def test_a_model_without_a_dense_last_layer_has_no_features(federate: Make, smooth: Make) -> None:
    seen = evidence(federate(smooth(1), classes=2))
    assert features.last_layer(seen.site, classes=5) is None


def test_inputs_and_answers_of_every_batch(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.01, batch_size=2, epochs=2, train_mode=False)
    done = federate(smooth(5), recipe=recipe, grant=KNOWN)
    seen = evidence(done)
    images = torch.rand(5, 1, 16, 16)
    found = received(seen.site, images, ["conv1", "fc"])
    assert list(found) == [(0, 1), (2, 3), (4,)]
    assert torch.equal(torch.cat([first for first, _ in found.values()]), images)
    logits = functional_call(seen.site.model, {**seen.site.start, **seen.site.rest}, (images,))
    assert torch.allclose(answered(seen.site, images), logits, atol=1e-6)
    assert not any(module._forward_pre_hooks for module in seen.site.model.modules())
