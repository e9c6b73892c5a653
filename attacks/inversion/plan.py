"""The parts an optimisation attack is composed of."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flpriv.attacks.inversion import start as starts
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
class Plan:
    """How updates are matched: the parts an attack is composed of.

    Args:
        optimiser: the search.
        iterations: evaluations of each problem, ≥ 1.
        objective: how updates are compared, before what is known of their compression.
        regularisers: (weight, penalty on the images of one update).
        start: the first trial.
        space: what is searched over.
        consensus: weight of the squared distance to the mean of an update's restarts (group consistency), ≥ 0.
        finish: what is done to the images found, ``(N, C, *spatial)`` to the same.
    """

    optimiser: Optimiser = field(default_factory=Adam)
    iterations: int = 1000
    objective: Objective = cosine
    regularisers: tuple[tuple[float, Regulariser], ...] = ()
    start: Start = starts.uniform
    space: Space = field(default_factory=Space)
    consensus: float = 0.0
    finish: Callable[[Tensor], Tensor] = lambda images: images
