"""QSGD against its formula, in mean and in variance."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from flpriv.defense import Local
from flpriv.defenses.qsgd import QSGD

from .conftest import Surroundings


def rounded(value: torch.Tensor, *, levels: int, seed: int = 0) -> torch.Tensor:
    here = Local(site="A", round=1, rng=torch.Generator().manual_seed(seed))
    return QSGD(levels=levels).protect({"w": value}, local=here)["w"]


def test_known_roundings() -> None:
    """With 5 levels up to 8 the grid is 0, 2, 4, 6, 8; what stands on it stays."""
    on = torch.tensor([[8.0, -6.0, 4.0], [0.0, -2.0, 2.0]])
    assert torch.equal(rounded(on, levels=5), on)
    off = rounded(torch.tensor([8.0, 5.0, -0.5]), levels=5)
    assert off[0] == 8 and off[1] in (4, 6) and off[2] in (-2, 0)


def test_it_is_unbiased_with_the_variance_of_a_coin() -> None:
    value = torch.tensor([1.0, -0.93, 0.5, 0.31, -0.07, 0.004, 0.0])
    draws = rounded(value.repeat(40_000, 1), levels=4).double()
    part = (value.double().abs() * 3).frac()
    variance = part * (1 - part) / 9
    assert torch.allclose(draws.mean(0), value.double(), atol=5 * float((variance.max() / 40_000).sqrt()))
    assert torch.allclose(draws.var(0), variance, atol=2e-3)


@given(some.lists(some.floats(-1e3, 1e3, width=32), min_size=1, max_size=60), some.integers(2, 40), some.integers(0, 2**31))
def test_everything_is_on_the_grid_next_to_where_it_was(entries: list[float], levels: int, seed: int) -> None:
    value = torch.tensor(entries, dtype=torch.float64)
    after, largest = rounded(value, levels=levels, seed=seed), value.abs().max()
    assert after.abs().max() <= largest * (1 + 1e-12)
    if largest < 1e-30:
        return
    place = after / largest * (levels - 1)
    assert torch.allclose(place, place.round(), atol=1e-6)
    assert bool(((after - value).abs() <= largest / (levels - 1) * (1 + 1e-9)).all())
    assert bool((after * value >= 0).all())


def test_seeded_and_not_in_place(local: Surroundings) -> None:
    value = torch.randn(400, generator=torch.Generator().manual_seed(2))
    before = value.clone()
    one, two, other = (rounded(value, levels=3, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert torch.equal(value, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_zeros_scalars_and_dtypes(dtype: torch.dtype, local: Surroundings) -> None:
    update = {"z": torch.zeros(3, 2, dtype=dtype), "s": torch.tensor(-2.0, dtype=dtype), "e": torch.zeros(0, 3, dtype=dtype)}
    after = QSGD().protect(update, local=local())
    assert all(torch.equal(after[key], value) and after[key].dtype == dtype for key, value in update.items())
