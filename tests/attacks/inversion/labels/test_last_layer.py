from __future__ import annotations

import pytest
import torch

from flpriv.attacks.inversion.labels.last_layer import LastLayer, layer_of, marks_of, names_of
from flpriv.errors import FlprivError


def layer(weight: list[list[float]] | None = None, bias: list[float] | None = None) -> LastLayer:
    tensors = (None if part is None else torch.tensor(part, dtype=torch.float64) for part in (weight, bias))
    return LastLayer(**dict(zip(("weight", "bias"), tensors, strict=True)))


def test_names_of_the_last_layer() -> None:
    entries = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 2), "c": torch.ones(5)}
    assert names_of(entries, classes=2) == ("b.weight", None)
    assert names_of({**entries, "b.bias": torch.ones(2)}, classes=2) == ("b.weight", "b.bias")
    assert names_of({**entries, "norm.bias": torch.ones(2)}, classes=2) == (None, "norm.bias")
    assert names_of({"f": torch.ones(2, 3, 1, 1), "g.bias": torch.ones(2)}, classes=2) == (None, "g.bias")
    with pytest.raises(FlprivError, match="know-labels"):
        names_of(entries, classes=4)


def test_marks_are_the_last_bias_or_the_row_sums_of_the_last_weight() -> None:
    update = {"a.weight": torch.ones(2, 3), "b.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "c": torch.ones(5)}
    assert marks_of(update, classes=2).tolist() == [3, 7]
    assert marks_of({**update, "b.bias": torch.tensor([5.0, 6.0])}, classes=2).tolist() == [5, 6]
    with pytest.raises(FlprivError, match="know-labels"):
        marks_of(update, classes=4)


def test_layers_are_copied_to_float64() -> None:
    entries = {"b.weight": torch.ones(2, 3, dtype=torch.float16), "b.bias": torch.ones(2, dtype=torch.bfloat16)}
    read = layer_of(entries, classes=2)
    assert read.weight is not None and read.bias is not None
    assert read.weight.dtype == read.bias.dtype == torch.float64


def test_arithmetic_goes_part_by_part() -> None:
    one, other = layer([[1.0], [2.0]], [3.0, 4.0]), layer([[10.0], [20.0]], [30.0, 40.0])
    total = one.plus(other, times=0.5)
    assert total.weight is not None and total.bias is not None
    assert (total.weight.tolist(), total.bias.tolist()) == ([[6.0], [12.0]], [18.0, 24.0])
    half = layer(None, [3.0, 4.0]).scaled(0.5)
    assert half.weight is None and half.bias is not None
    assert half.bias.tolist() == [1.5, 2.0]


def test_the_mark_without_a_bias_is_measured_along_the_mean_feature() -> None:
    """Features of both signs, whose row sums would say the contrary."""
    feature = torch.tensor([1.0, -2.0], dtype=torch.float64)
    mark = torch.tensor([-0.6, 0.2, 0.4], dtype=torch.float64)
    rows = LastLayer(weight=mark[:, None] * feature, bias=None)
    assert torch.allclose(rows.mark(feature), mark)
    assert torch.allclose(rows.mark(), -mark)


def test_a_bias_that_lost_one_entry_gets_it_back() -> None:
    assert layer(None, [-0.5, 0.0, 0.2]).mark().tolist() == pytest.approx([-0.5, 0.3, 0.2])
    assert layer(None, [-0.5, 0.0, 0.5]).mark().tolist() == [-0.5, 0.0, 0.5], "a class that nobody expects has a mark of zero"


def test_a_bias_that_lost_more_borrows_from_the_weight() -> None:
    feature = torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64)
    mark = torch.tensor([-0.5, 0.3, 0.2], dtype=torch.float64)
    weight = mark[:, None] * feature
    weight[:, 2] = 0
    lost = LastLayer(weight=weight, bias=torch.tensor([-0.5, 0.0, 0.0], dtype=torch.float64))
    assert torch.allclose(lost.mark(feature), mark)
    assert lost.mark().tolist() == [-0.5, 0.0, 0.0]
