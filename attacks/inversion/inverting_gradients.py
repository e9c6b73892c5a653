"""Inverting gradients: cosine matching with total variation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.search import Adam
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(MatchingAttack):
    """Finds images whose update points where the observed one does, by signed Adam on cosine distance and total variation.

    Args:
        lr: first step of Adam, on images in [0, 1].
        tv: weight of the total variation, ≥ 0; more suits noisy updates, less suits deep networks.
        signed: feed Adam the sign of the gradient, not the gradient.
    """

    name: ClassVar[str] = "inverting-gradients"
    paper: ClassVar[str] = "Geiping et al. 2020, https://arxiv.org/abs/2003.14053"

    lr: Annotated[float, Field(gt=0)] = 0.1
    tv: Annotated[float, Field(ge=0)] = 0.01
    signed: bool = True

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """Step schedule from uniform noise to its end, as published: long first steps may gain nothing for a while."""
        return Plan(
            optimiser=Adam(lr=self.lr, signed="hard" if self.signed else "none", patience=self.iterations),
            iterations=self.iterations,
            regularisers=((self.tv, total_variation),),
        )
