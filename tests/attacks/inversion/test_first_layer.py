from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.first_layer import descent, first_layer, images_behind
from flpriv.attacks.inversion.linear_layer import read
from flpriv.capture import Observation
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.task import Task

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")


def task(model: str, *, shape: tuple[int, ...] = (1, 8, 8), classes: int = 2, mean: float = 0.4, **options: Any) -> Task:
    names = tuple(map(str, range(classes)))
    return Task(modality="xray", shape=shape, classes=names, model=model, options=options, mean=mean, std=0.3)


@pytest.mark.parametrize(
    ("model", "options", "name", "neurons", "rectified"),
    [
        ("flpriv.testing:dense_net", {"inputs": 64, "width": 50}, "1", 50, True),
        (f"{NETS}:mlp", {"inputs": 64, "widths": (40, 30)}, "1", 40, True),
        (f"{NETS}:Functional", {"inputs": 64}, "first", 64, True),
        (f"{NETS}:before", {"inputs": 64, "what": "sigmoid"}, "1", 64, False),
        (f"{NETS}:before", {"inputs": 64, "what": "leaky"}, "1", 64, False),
        (f"{NETS}:before", {"inputs": 64, "what": "norm"}, "1", 64, False),
        (f"{NETS}:before", {"inputs": 64, "what": "dropped"}, "2", 64, True),
    ],
)
def test_the_layer_is_found_by_running_the_model(model: str, options: Any, name: str, neurons: int, rectified: bool) -> None:
    found = first_layer(task(model, classes=3, **options), who="test")
    assert (found.name, found.neurons, found.rectified) == (name, neurons, rectified)


def test_volumes_have_a_first_layer_too() -> None:
    found = first_layer(task("flpriv.testing:dense_net", shape=(2, 3, 4, 5), inputs=120, classes=3), who="test")
    assert found.rectified


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("cnn", {}, "test: the first layer with weights, 'conv1', is a Conv2d"),
        ("resnet18", {}, "is a Conv2d"),
        (f"{NETS}:mlp", {"inputs": 64, "widths": (40,), "bias": False}, "'1', has no bias"),
        (f"{NETS}:before", {"inputs": 64, "what": "pooled"}, "'2', does not see the pixels"),
    ],
)
def test_other_models_are_refused(model: str, options: Any, message: str) -> None:
    with pytest.raises(FlprivError, match=message):
        first_layer(task(model, **options), who="test")


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_the_pull_of_weight_decay_is_put_back(federate: Make, smooth: Make, momentum: float) -> None:
    """What is left of four steps on one image is an image times a number for each neuron; with the pull it is not."""
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=4, momentum=momentum, weight_decay=0.1)
    done = federate(smooth(1), recipe=recipe, model="flpriv.testing:dense_net", options={"classes": 2})
    (seen,) = done.capture.observations
    moved = descent(seen, ("1.weight", "1.bias"))
    assert read(moved["1.weight"], moved["1.bias"])[1] > 1 - 1e-4
    plain = {key: seen.sent[key].double() - seen.returned[key].double() for key in moved}
    assert read(plain["1.weight"], plain["1.bias"])[1] < 0.95


@pytest.mark.parametrize(
    ("recipe", "examples", "expected"),
    [
        (LocalRecipe(batch_size=8, steps=1), 150, 8),
        (LocalRecipe(batch_size=8, steps=1), 3, 3),
        (LocalRecipe(batch_size=8, steps=1), None, 8),
        (LocalRecipe(batch_size=8, epochs=2), 20, 20),
        (LocalRecipe(batch_size=8, epochs=2), None, None),
        (None, 20, None),
    ],
)
def test_images_behind_an_update(recipe: LocalRecipe | None, examples: int | None, expected: int | None) -> None:
    weights = {"w": torch.zeros(1)}
    seen = Observation(round=1, node=7, sent=weights, returned=weights, examples=examples, local=recipe)
    assert images_behind(seen) == expected
