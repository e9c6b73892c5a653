"""Send only the largest entries of each tensor of the update."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.defense import Defense, Local
from flpriv.state import State


@dataclass(frozen=True, kw_only=True)
class TopK(Defense):
    """Keep the largest ``keep`` share of each tensor's entries by absolute value and send zero for the rest.

    Of n entries ⌈n·keep⌉ stay, exactly as they were. It saves bytes and blurs inversion; it hides nothing from an attack
    that simulates it, and nothing at all of the entries it keeps.

    Args:
        keep: share that stays, in (0, 1]; 1 is the identity.
    """

    name: ClassVar[str] = "top-k"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = (
        "Aji and Heafield, Sparse Communication for Distributed Gradient Descent, EMNLP 2017 (arXiv 1704.05021)"
    )

    keep: Annotated[float, Field(gt=0, le=1)] = 0.1

    def protect(self, update: State, *, local: Local) -> State:
        """The update with all but its largest entries set to zero."""
        if self.keep == 1:
            return update
        return {key: self._largest(value) for key, value in update.items()}

    def _largest(self, value: Tensor) -> Tensor:
        flat = value.flatten()
        stay = flat.abs().topk(ceil(round(len(flat) * self.keep, 6)), sorted=False).indices
        return torch.zeros_like(flat).index_copy_(0, stay, flat[stay]).reshape(value.shape)
