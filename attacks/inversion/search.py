"""The search for images whose update is the one observed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.progress import tell

Loss = Callable[[Tensor], Tensor]
"""Trial images ``(N, C, *spatial)`` to a scalar, lower is better."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where a search ended.

    Args:
        images: ``(N, C, *spatial)``, in [0, 1].
        objective: scalar loss of these images.
    """

    images: Tensor
    objective: Tensor


def descend(loss: Loss, start: Tensor, *, iterations: int, lr: float, signed: bool, what: str) -> Found:
    """Adam within the box [0, 1], its step a tenth after 3/8, 5/8 and 7/8 of the iterations; the best trial met on the way.

    With ``signed``, Adam is fed the sign of the gradient (Geiping et al. 2020, https://arxiv.org/abs/2003.14053).
    """
    trial = start.detach().clone().clamp_(0, 1).requires_grad_()
    adam = torch.optim.Adam([trial], lr=lr)
    milestones = [iterations * eighths // 8 for eighths in (3, 5, 7)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(adam, milestones)
    best = Found(images=trial.detach().clone(), objective=trial.new_tensor(torch.inf))
    for iteration in range(iterations):
        value = loss(trial)
        best = _better(best, trial, value)
        (slope,) = torch.autograd.grad(value, trial)
        trial.grad = slope.sign() if signed else slope
        adam.step()
        schedule.step()
        with torch.no_grad():
            trial.clamp_(0, 1)
        if iteration % 50 == 49:
            tell(what, iteration + 1, iterations, f"objective {float(best.objective):.4f}")
    return _better(best, trial, loss(trial))


def _better(best: Found, trial: Tensor, value: Tensor) -> Found:
    """``trial`` where it beats ``best``, without waiting for the device."""
    wins = value.detach() < best.objective
    return Found(
        images=torch.where(wins, trial.detach(), best.images),
        objective=torch.where(wins, value.detach(), best.objective),
    )
