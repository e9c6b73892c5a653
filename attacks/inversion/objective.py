"""How far a trial's update is from the one observed. Both are sequences of tensors in the same order and of the same shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Objective = Callable[[Sequence[Tensor], Sequence[Tensor]], Tensor]
"""(trial, observed) to a scalar, lower is closer, differentiable in the trial."""


def cosine(trial: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """``1 - <trial, observed> / (|trial| |observed|)`` over all tensors together, in [0, 2]; 1 where either is zero.

    Blind to scale, hence to the learning rate and to clipping (Geiping et al. 2020, https://arxiv.org/abs/2003.14053).
    """
    return 1 - _dot(trial, observed) / (_norm(trial) * _norm(observed))


def squared(trial: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """``|trial - observed|² / 2`` over all tensors together, ≥ 0 (Zhu et al. 2019, https://arxiv.org/abs/1906.08935)."""
    apart = [a - b for a, b in zip(trial, observed, strict=True)]
    return _dot(apart, apart) / 2


def _norm(one: Sequence[Tensor]) -> Tensor:
    square = _dot(one, one)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]).sum()
