"""Send each tensor of the update on a coarse grid, rounded at random."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.defense import Defense, Local
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class QSGD(Defense):
    """Round each tensor's entries at random to one of ``levels`` magnitudes, evenly spaced from 0 to its largest.

    An entry stands between two magnitudes k·s and (k+1)·s, s = max|Δ|/(levels - 1), and becomes the upper one with the chance
    that leaves its mean as it was: the update stays unbiased, and its largest entry exact. The maximum takes the place of the
    paper's Euclidean norm, as is common in practice. It saves bytes and blurs inversion; it proves nothing.

    Args:
        levels: magnitudes to choose from, 0 among them, ≥ 2; fewer are coarser.
    """

    name: ClassVar[str] = "qsgd"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "Alistarh et al., QSGD: Communication-Efficient SGD, NeurIPS 2017 (arXiv 1610.02132)"

    levels: Annotated[int, Field(ge=2)] = 16

    def protect(self, update: State, *, local: Local) -> State:
        """The update on its grids."""
        return {key: self._rounded(value, local.rng) if value.numel() else value for key, value in update.items()}

    def _rounded(self, value: Tensor, rng: torch.Generator) -> Tensor:
        wide = value.double()
        step = (wide.abs().max() / (self.levels - 1)).clamp_min(torch.finfo(torch.float64).tiny)
        place = wide.abs() / step
        chance = torch.rand(value.shape, generator=rng, dtype=torch.float64, device=rng.device).to(value.device)
        level = (place.floor() + (chance < place.frac())).clamp_max(self.levels - 1)
        return (wide.sign() * level * step).to(value.dtype)
