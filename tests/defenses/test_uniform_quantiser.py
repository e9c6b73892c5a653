"""Deterministic rounding against hand counts and its bound."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from flpriv.defense import Local
from flpriv.defenses.uniform_quantiser import UniformQuantiser
from flpriv.errors import ScenarioError
from flpriv.registry import validate

from .conftest import Surroundings


def test_known_roundings(local: Surroundings) -> None:
    """With 3 bits the grid has 3 steps up to the largest: 0, 2, 4, 6."""
    value = torch.tensor([6.0, -5.1, 2.9, 0.9, -1.1, 0.0])
    after = UniformQuantiser(bits=3).protect({"w": value}, local=local())["w"]
    assert torch.equal(after, torch.tensor([6.0, -6.0, 2.0, 0.0, -2.0, 0.0]))
    assert torch.equal(value, torch.tensor([6.0, -5.1, 2.9, 0.9, -1.1, 0.0]))


@given(some.lists(some.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), some.integers(2, 16))
def test_no_entry_moves_more_than_half_a_step(entries: list[float], bits: int) -> None:
    value = torch.tensor(entries, dtype=torch.float64)
    after = UniformQuantiser(bits=bits).protect({"w": value}, local=Local(site="A", round=1, rng=torch.Generator()))["w"]
    step = value.abs().max() / (2 ** (bits - 1) - 1)
    assert bool(((after - value).abs() <= step / 2 * (1 + 1e-9)).all())
    assert len(set(after.abs().tolist())) <= 2 ** (bits - 1)
    assert torch.allclose(after.abs().max(), value.abs().max())


def test_each_tensor_has_a_grid_of_its_own(local: Surroundings) -> None:
    update = {"w": torch.tensor([100.0, 40.0]), "b": torch.tensor([0.1, 0.04])}
    after = UniformQuantiser(bits=2).protect(update, local=local())
    assert torch.equal(after["w"], torch.tensor([100.0, 0.0])) and torch.equal(after["b"], torch.tensor([0.1, 0.0]))


def test_zeros_scalars_and_dtypes(local: Surroundings) -> None:
    update = {"z": torch.zeros(3), "s": torch.tensor(-2.0), "h": torch.tensor([1.0, -1.0]).half(), "e": torch.zeros(0, 3)}
    after = UniformQuantiser().protect(update, local=local())
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in update.items())


@pytest.mark.parametrize("bits", [1, 17])
def test_bits_out_of_range_are_refused(bits: int) -> None:
    with pytest.raises(ScenarioError, match="bits"):
        validate(UniformQuantiser, {"bits": bits}, where="defense 'uniform-quantiser'")
