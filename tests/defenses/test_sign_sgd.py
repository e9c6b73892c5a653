"""Signs against counting."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as some

from flpriv.defense import Local
from flpriv.defenses.sign_sgd import SignSGD

from .conftest import Surroundings


def test_signs_times_the_mean_of_each_tensor(local: Surroundings) -> None:
    update = {"w": torch.tensor([[3.0, -1.0], [0.0, 4.0]]), "b": torch.tensor([-0.5, 0.25])}
    after = SignSGD().protect(update, local=local())
    assert torch.equal(after["w"], torch.tensor([[2.0, -2.0], [0.0, 2.0]]))
    assert torch.equal(after["b"], torch.tensor([-0.375, 0.375]))
    assert torch.equal(update["w"], torch.tensor([[3.0, -1.0], [0.0, 4.0]]))


@given(some.lists(some.floats(-1e3, 1e3, width=32), min_size=1, max_size=60))
def test_magnitudes_are_two_at_most_and_signs_stay(entries: list[float]) -> None:
    value = torch.tensor(entries, dtype=torch.float64)
    after = SignSGD().protect({"w": value}, local=Local(site="A", round=1, rng=torch.Generator()))["w"]
    assert torch.equal(after.sign(), value.sign())
    assert set(after.abs().tolist()) <= {0.0, float(value.abs().mean())}


def test_a_tensor_without_zeros_keeps_its_1_norm(local: Surroundings) -> None:
    value = torch.randn(300, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(SignSGD().protect({"w": value}, local=local())["w"].abs().sum(), value.abs().sum())


def test_zeros_scalars_and_dtypes(local: Surroundings) -> None:
    update = {"z": torch.zeros(3), "s": torch.tensor(-2.0), "h": torch.tensor([1.0, -1.0]).half(), "e": torch.zeros(0, 3)}
    after = SignSGD().protect(update, local=local())
    assert all(torch.equal(after[key], value) and after[key].dtype == value.dtype for key, value in update.items())
