"""How far a trial's update is from the one observed. Both are sequences of tensors in the same order and of the same shapes.

Objectives are functions; :func:`mix`, :func:`weighted` and :func:`each` make new ones of them. All work under ``torch.func``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Literal

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


def relative(trial: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """``|trial - observed|² / |observed|²`` over all tensors together, ≥ 0; 1 for a trial without any update.

    :func:`squared` in a unit that does not depend on the network, so that weights of regularisers carry over.
    """
    apart = [a - b for a, b in zip(trial, observed, strict=True)]
    return _dot(apart, apart) / _norm(observed).square()


def absolute(trial: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
    """``Σ|trial - observed| / Σ|observed|`` over all tensors together, ≥ 0: L1, which single wrong entries do not rule."""
    apart = sum(((a - b).abs().sum() for a, b in zip(trial, observed, strict=True)), start=observed[0].new_zeros(()))
    size = sum((b.abs().sum() for b in observed), start=observed[0].new_zeros(()))
    return apart / size.clamp_min(torch.finfo(size.dtype).tiny)


def mix(*parts: tuple[float, Objective]) -> Objective:
    """The weighted sum of objectives."""
    return lambda trial, observed: torch.stack([weight * part(trial, observed) for weight, part in parts]).sum()


def weighted(base: Objective, weight: Callable[[int, int], float]) -> Objective:
    """``base`` on tensors scaled by ``weight(place, count)``, place from 0 at the model's input; squares count its square."""

    def compare(trial: Sequence[Tensor], observed: Sequence[Tensor]) -> Tensor:
        scales = [weight(place, len(observed)) for place in range(len(observed))]
        scaled = [[scale * one for scale, one in zip(scales, side, strict=True)] for side in (trial, observed)]
        return base(*scaled)

    return compare


def each(base: Objective) -> Objective:
    """The mean over tensors of ``base`` on each by itself, so that every layer counts the same, however small its gradient."""
    return lambda trial, observed: torch.stack([base([a], [b]) for a, b in zip(trial, observed, strict=True)]).mean()


Distance = Literal["l2", "l1", "cosine"]
DISTANCES: Mapping[Distance, Objective] = {"l2": relative, "l1": absolute, "cosine": cosine}
"""Objectives whose value for a trial without any update is about 1, by name."""


def _norm(one: Sequence[Tensor]) -> Tensor:
    square = _dot(one, one)
    return square.clamp_min(torch.finfo(square.dtype).tiny).sqrt()


def _dot(one: Sequence[Tensor], other: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.dot(a.flatten(), b.flatten()) for a, b in zip(one, other, strict=True)]).sum()
