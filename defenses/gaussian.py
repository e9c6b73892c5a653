"""Clip the update and add Gaussian noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field

from flpriv.defense import Defense, Local
from flpriv.defenses.clipping import factor
from flpriv.defenses.ledger import fingerprint, spend
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class Gaussian(Defense):
    """Clip the whole update to a Euclidean norm, then add Gaussian noise in proportion to it.

    ``Δ·min(1, C/‖Δ‖) + N(0, (z·C)²)`` over all parameters together. With ``noise_multiplier=0`` it only clips, and with
    ``max_grad_norm=inf`` besides it is the identity. Noise that is to hide a record must be set against the clipping norm:
    noise small beside the update leaves reconstructions readable.

    Args:
        max_grad_norm: C, the largest norm an update leaves with, > 0.
        noise_multiplier: z, standard deviation of the noise in units of C, ≥ 0.
        formal: also keep account of what the noise proves and say ε in the site's notes. What is protected then is the whole
            update: any two updates of norm ≤ C lie within 2C, so each round is a Gaussian mechanism of multiplier z/2, composed
            over the rounds the site took part in. Needs noise and a finite C.
        delta: δ of the (ε, δ) that is said where ``formal``, in (0, 1).
    """

    name: ClassVar[str] = "gaussian"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = (
        "McMahan et al., Learning Differentially Private Recurrent Language Models, ICLR 2018 (arXiv 1710.06963)"
    )

    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    noise_multiplier: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    formal: bool = False
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5

    def __post_init__(self) -> None:
        """Refuse a guarantee that nothing would back."""
        if self.max_grad_norm == float("inf") and self.noise_multiplier > 0:
            raise ValueError("noise is measured in units of max_grad_norm: give a finite max_grad_norm, or noise_multiplier = 0")
        if self.formal and self.noise_multiplier == 0:
            raise ValueError("formal = true needs noise: give noise_multiplier > 0")

    def protect(self, update: State, *, local: Local) -> State:
        """The clipped and noised update.

        Raises:
            UpdateError: if the update holds NaN or infinite values, which clipping cannot bound.
        """
        scale = factor(update, max_grad_norm=self.max_grad_norm, local=local)
        if scale == 1 and self.noise_multiplier == 0:
            return update
        sigma = self.noise_multiplier * self.max_grad_norm
        done = {key: value * scale + sigma * _normal(value, local.rng) for key, value in update.items()}
        if self.formal:
            multiplier = self.noise_multiplier / 2
            spent = spend(local, ledger=self.name, key=fingerprint(done), noise_multiplier=multiplier, sample_rate=1.0, steps=1)
            local.notes.update(epsilon=spent.epsilon(self.delta), delta=self.delta)
        return done


def _normal(like: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    return torch.randn(like.shape, generator=rng, dtype=like.dtype, device=rng.device).to(like.device)
