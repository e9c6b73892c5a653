from __future__ import annotations

import pytest
import torch

from flpriv.attacks.inversion.search import descend
from flpriv.progress import listen


@pytest.mark.parametrize("signed", [True, False])
def test_descent_finds_the_minimum_in_the_box(signed: bool) -> None:
    goal = torch.tensor([[-0.5, 0.25, 0.8, 1.7]])
    start = torch.full((1, 4), 0.5)
    found = descend(lambda x: (x - goal).square().sum(), start, iterations=400, lr=0.1, signed=signed, what="test")
    assert torch.allclose(found.images, goal.clamp(0, 1), atol=2e-3)
    assert found.objective.item() == pytest.approx((found.images - goal).square().sum().item())
    assert torch.equal(start, torch.full((1, 4), 0.5))


def test_the_best_trial_is_kept_though_the_search_leaves_it() -> None:
    seen: list[float] = []

    def loss(x: torch.Tensor) -> torch.Tensor:
        value = (x - 0.5).abs().sum() + (0 if len(seen) < 3 else 10)
        seen.append(value.item())
        return value

    found = descend(loss, torch.tensor([[0.9]]), iterations=20, lr=0.1, signed=True, what="test")
    assert found.objective.item() == min(seen) < 10


def test_a_loss_that_is_no_number_never_wins() -> None:
    found = descend(lambda x: (x / 0).sum(), torch.rand(1, 2), iterations=2, lr=0.1, signed=True, what="test")
    assert found.objective.item() == torch.inf
    assert bool(torch.isfinite(found.images).all())


def test_progress_is_told_with_the_objective() -> None:
    told: list[tuple[str, int, int | None, str]] = []
    with listen(lambda *what: told.append(what)):
        descend(lambda x: x.sum(), torch.rand(1, 2), iterations=100, lr=0.1, signed=True, what="test")
    assert [(what, done, total) for what, done, total, _ in told] == [("test", 50, 100), ("test", 100, 100)]
    assert all(note.startswith("objective") for *_, note in told)
