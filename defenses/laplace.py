"""Clip the update and add Laplace noise."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf, sqrt
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.defense import Defense, Local
from flpriv.defenses.clipping import factor
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class Laplace(Defense):
    """Clip the whole update to a Euclidean norm, then add Laplace noise in proportion to it.

    ``Δ·min(1, C/‖Δ‖) + Lap(0, z·C/√2)`` over all parameters together: noise of the same standard deviation z·C as ``gaussian``
    adds under the same options, so that the two compare. It proves nothing: what a Laplace mechanism needs to be bounded is the
    1-norm, and the noise that would take leaves no model to learn.

    Args:
        max_grad_norm: C, the largest Euclidean norm an update has before the noise, > 0.
        noise_multiplier: z, standard deviation of the noise in units of C, ≥ 0.
    """

    name: ClassVar[str] = "laplace"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "Zhu et al., Deep Leakage from Gradients, NeurIPS 2019 (arXiv 1906.08935), section 5.1"

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1

    def __post_init__(self) -> None:
        """Refuse noise in proportion to nothing."""
        if self.max_grad_norm == inf and self.noise_multiplier > 0:
            raise ValueError("noise is measured in units of max_grad_norm: give a finite max_grad_norm, or noise_multiplier = 0")

    def protect(self, update: State, *, local: Local) -> State:
        """The clipped and noised update.

        Raises:
            UpdateError: if the update holds NaN or infinite values, which clipping cannot bound.
        """
        scale = factor(update, max_grad_norm=self.max_grad_norm, local=local)
        if self.noise_multiplier == 0:
            return update if scale == 1 else {key: value * scale for key, value in update.items()}
        b = self.noise_multiplier * self.max_grad_norm / sqrt(2)
        return {key: value * scale + b * _laplace(value, local.rng) for key, value in update.items()}


def _laplace(like: Tensor, rng: torch.Generator) -> Tensor:
    """Laplace noise of scale 1: two exponential draws, one off the other."""
    one, other = (torch.empty(like.shape, dtype=torch.float64, device=rng.device).exponential_(generator=rng) for _ in range(2))
    return (one - other).to(like)
