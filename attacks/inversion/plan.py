"""The parts an optimisation attack is composed of."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flpriv.attacks.inversion import start as starts
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.objective import Objective, cosine
from flpriv.attacks.inversion.regularisers import Regulariser
from flpriv.attacks.inversion.search import Adam, Optimiser

Start = Callable[[tuple[int, ...], torch.Generator], Tensor]
"""(shape ``(N, C, *spatial)``, generator on the CPU) to a first trial of that shape."""


@dataclass(frozen=True, kw_only=True)
class Space:
    """What is searched over, where it is not the pixels themselves.

    Args:
        encode: first images ``(N, C, *spatial)`` and labels ``(N,)`` of one problem to a first trial.
        decode: a trial and the labels to images and labels (or class probabilities ``(N, classes)``), differentiable.
    """

    encode: Callable[[Tensor, Tensor], Tensor] = lambda images, labels: images
    decode: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] = lambda trial, labels: (trial, labels)


@dataclass(frozen=True, kw_only=True)
class Hint:
    """A regulariser that uses what each update tells besides its direction, e.g. the statistics of its batches.

    Args:
        weight: ≥ 0.
        read: one update and the labels of one problem, ``(N,)``, to what is told, of the same shapes for every problem.
        penalty: (images ``(N, C, *spatial)``, what is told) to a scalar.
    """

    weight: float
    read: Callable[[Evidence, Tensor], Sequence[Tensor]]
    penalty: Callable[[Tensor, Sequence[Tensor]], Tensor]


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How updates are matched: the parts an attack is composed of.

    Args:
        optimiser: the search.
        iterations: evaluations of each problem, ≥ 1.
        objective: how updates are compared, before what is known of their compression.
        regularisers: (weight, penalty on the images of one update).
        hints: regularisers that are told something by each update.
        start: the first trial.
        space: what is searched over.
        consensus: weight of the squared distance to the mean of an update's restarts (group consistency), ≥ 0.
        sharpness: of the model's ReLUs, see :mod:`flpriv.attacks.inversion.smoothing`; infinite leaves them as they are.
        finish: what is done to the images found, ``(N, C, *spatial)`` to the same.
        then: a further search from the images found, e.g. over pixels after one over latents; its ``start`` does not count, and
            of all searches only the last one's ``finish`` does.
    """

    optimiser: Optimiser = field(default_factory=Adam)
    iterations: int = 1000
    objective: Objective = cosine
    regularisers: tuple[tuple[float, Regulariser], ...] = ()
    hints: tuple[Hint, ...] = ()
    start: Start = starts.uniform
    space: Space = field(default_factory=Space)
    consensus: float = 0.0
    sharpness: float = math.inf
    finish: Callable[[Tensor], Tensor] = lambda images: images
    then: Plan | None = None

    @property
    def stages(self) -> tuple[Plan, ...]:
        """This search and those that follow it."""
        return (self, *(self.then.stages if self.then is not None else ()))
