"""The nulls of a reconstruction: what an adversary without the update has to offer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.errors import ClaimError
from flpriv.measures.images import all_mse
from flpriv.records import Records
from flpriv.truth import Truth

MOST = 128
"""Public images the null may choose from, for each original."""


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """Public images, or other patients' where there are none; none is offered for its own patient.

    Args:
        drawn: at most ``MOST`` of ``pool``, drawn with a fixed seed.
        pool: all there are.
        public: whether they are of patients of no site.
    """

    drawn: Records
    pool: Records
    public: bool

    @property
    def source(self) -> str:
        """``"public images"`` or ``"other patients' images"``."""
        return "public images" if self.public else "other patients' images"

    @property
    def best_name(self) -> str:
        """``"best of 128 public images"``."""
        return f"best of {len(self.drawn)} {self.source}"

    @property
    def mean_name(self) -> str:
        """``"mean public image"``."""
        return "mean public image" if self.public else "mean of other patients' images"

    def nearest(self, originals: Tensor, patients: Sequence[str]) -> Tensor:
        """For each original the drawn image of the smallest mean squared error: a choice that takes the truth to make."""
        distance = all_mse(originals, self.drawn.images)
        if self.drawn.patients:
            own = torch.tensor([[mine == theirs for theirs in self.drawn.patients] for mine in patients])
            distance = distance.masked_fill(own, float("inf"))
        return self.drawn.images[distance.argmin(1)]

    def mean(self, patients: Sequence[str]) -> Tensor:
        """``(N, C, *spatial)``: the mean of the pool without the patient's own images; black where no others are left."""
        total = self.pool.images.sum(0, dtype=torch.float64)
        means: dict[str, Tensor] = {}
        for patient in dict.fromkeys(patients):
            own = [row for row, other in enumerate(self.pool.patients) if other == patient]
            others = total - self.pool.images[own].sum(0, dtype=torch.float64) if own else total
            means[patient] = (others / max(1, len(self.pool) - len(own))).float().clamp(0, 1)
        return torch.stack([means[patient] for patient in patients])


def draw(truth: Truth, *, seed: int) -> Guesses:
    """The guesses an audit compares with.

    Raises:
        ClaimError: where the truth knows no image but those attacked.
    """
    public = truth.public is not None and len(truth.public) > 0
    pool = truth.public if public else truth.everyone
    if pool is None or not len(pool):
        raise ClaimError("reconstructions cannot be judged without a null: set patients aside with sites.split.public")
    chosen = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:MOST]
    return Guesses(drawn=pool.take(chosen), pool=pool, public=public)
