"""Send each tensor of the update on a coarse grid, rounded to the nearest point."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.defense import Defense, Local
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class UniformQuantiser(Defense):
    """Round each tensor's entries to the nearest multiple of s = max|Δ|/(2^(bits-1) - 1).

    That is a sign and ``bits`` - 1 bits of magnitude. Entries below s/2 become zero, so the update is biased, unlike under
    ``qsgd``, and the more so the longer its tails. It saves bytes and blurs inversion; it proves nothing.

    Args:
        bits: of an entry, its sign included, in 2 … 16; 2 sends each tensor's largest entries with their signs and nothing else.
    """

    name: ClassVar[str] = "uniform-quantiser"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "Gray and Neuhoff, Quantization, IEEE Transactions on Information Theory 44(6), 1998"

    bits: Annotated[int, Field(ge=2, le=16)] = 4

    def protect(self, update: State, *, local: Local) -> State:
        """The update on its grids."""
        return {key: self._rounded(value) if value.numel() else value for key, value in update.items()}

    def _rounded(self, value: Tensor) -> Tensor:
        wide = value.double()
        step = (wide.abs().max() / (2 ** (self.bits - 1) - 1)).clamp_min(torch.finfo(torch.float64).tiny)
        level = (wide / step).round()
        return torch.mul(level, step).to(value.dtype)
