"""Top-k against counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as some

from flpriv.defenses.top_k import TopK

from .conftest import Surroundings


def test_keeps_the_largest_of_each_tensor_as_they_are(local: Surroundings) -> None:
    value = torch.tensor([[0.1, -5.0, 2.0], [0.0, 3.0, -0.2]])
    after = TopK(keep=0.34).protect({"w": value, "b": torch.tensor([1.0, -2.0])}, local=local())
    assert torch.equal(after["w"], torch.tensor([[0.0, -5.0, 2.0], [0.0, 3.0, 0.0]]))
    assert torch.equal(after["b"], torch.tensor([0.0, -2.0]))


def test_keeping_all_is_the_identity(local: Surroundings) -> None:
    update = {"w": torch.randn(3, 4)}
    assert TopK(keep=1.0).protect(update, local=local()) is update


@given(some.integers(1, 500), some.integers(1, 100))
def test_exactly_the_ceiling_of_the_share_stays(count: int, percent: int) -> None:
    from flpriv.defense import Local

    here = Local(site="A", round=1, rng=torch.Generator())
    value = torch.randperm(count, generator=torch.Generator().manual_seed(count)) + 1.0
    after = TopK(keep=percent / 100).protect({"w": value}, local=here)["w"]
    assert int((after != 0).sum()) == -(-count * percent // 100)


def test_scalars_and_half_precision(local: Surroundings) -> None:
    update = {"s": torch.tensor(2.0), "h": torch.randn(9).half()}
    after = TopK(keep=0.01).protect(update, local=local())
    assert after["s"].shape == () and after["h"].dtype == torch.float16
    assert after["s"] == pytest.approx(2.0)
