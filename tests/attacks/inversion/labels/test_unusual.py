from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot

from flpriv.attacks.inversion.labels.last_layer import LastLayer
from flpriv.attacks.inversion.labels.unusual import Puzzle, least_unusual, puzzle

CLASSES, FEATURES = 5, 40


def batch(labels: Tensor, seed: int) -> tuple[LastLayer, LastLayer, Tensor]:
    """The gradient of a last layer with answers that depend on the image much, the layer, and features of other images."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=rng, dtype=torch.float64)

    layer = LastLayer(weight=normal(CLASSES, FEATURES) / 4, bias=normal(CLASSES) / 2)
    assert layer.weight is not None and layer.bias is not None
    features = 0.5 + normal(len(labels), FEATURES)
    wrong = (features @ layer.weight.T + layer.bias).softmax(1) - one_hot(labels, CLASSES)
    gradient = LastLayer(weight=wrong.T @ features / len(labels), bias=wrong.mean(0))
    return gradient, layer, 0.5 + normal(64, FEATURES)


def of(labels: Tensor, seed: int) -> Puzzle:
    gradient, layer, guesses = batch(labels, seed)
    return puzzle(gradient, layer, guesses, images=len(labels))


@pytest.mark.parametrize("seed", range(4))
def test_true_labels_need_features_as_usual_as_any(seed: int) -> None:
    """``|x|²`` of the true features is about one for each of ``images × axes`` numbers, and nothing is left unexplained."""
    labels = torch.tensor([0, 1, 3])
    riddle = of(labels, seed)
    cost = riddle.cost(torch.bincount(labels, minlength=CLASSES))
    assert cost < 2 * len(labels) * riddle.slopes.shape[1]
    assert cost < riddle.cost(torch.tensor([1, 1, 0, 0, 1]))


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 10**6), data=st.data())
def test_labels_are_found_from_a_wrong_start(seed: int, data: st.DataObject) -> None:
    labels = torch.tensor(data.draw(st.permutations(range(CLASSES)))[:3])
    start = torch.bincount(torch.tensor(data.draw(st.permutations(range(CLASSES)))[:3]), minlength=CLASSES)
    found = least_unusual(of(labels, seed), start=start, among=torch.ones(CLASSES, dtype=torch.bool))
    assert torch.equal(found, torch.bincount(labels, minlength=CLASSES))


def test_classes_that_are_certain_keep_their_count() -> None:
    among = torch.tensor([True, True, True, False, False])
    found = least_unusual(of(torch.tensor([0, 1, 3]), 0), start=torch.tensor([0, 2, 0, 1, 0]), among=among)
    assert found.tolist() == [1, 1, 0, 1, 0]


def test_the_order_of_classes_does_not_matter() -> None:
    labels, order = torch.tensor([0, 1, 3]), torch.tensor([4, 2, 0, 1, 3])
    gradient, layer, guesses = batch(labels, 0)
    assert gradient.weight is not None and gradient.bias is not None and layer.weight is not None and layer.bias is not None
    turned = puzzle(
        LastLayer(weight=gradient.weight[order], bias=gradient.bias[order]),
        LastLayer(weight=layer.weight[order], bias=layer.bias[order]),
        guesses,
        images=3,
    )
    counts = torch.bincount(labels, minlength=CLASSES)
    cost = puzzle(gradient, layer, guesses, images=3).cost(counts)
    assert turned.cost(counts[order]) == pytest.approx(cost, rel=1e-2)


def test_a_gradient_of_nothing_has_a_cost_too() -> None:
    gradient, layer, guesses = batch(torch.tensor([0, 1, 3]), 0)
    nothing = puzzle(gradient.scaled(0.0), layer, guesses, images=3)
    assert 0 < nothing.cost(torch.tensor([1, 1, 0, 1, 0])) < float("inf")
