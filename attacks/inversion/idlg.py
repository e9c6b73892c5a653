"""Improved deep leakage from gradients: labels read first, then images searched for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.search import LBFGS
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class IDLG(MatchingAttack):
    """Reads the label from the last layer, then finds the image whose update is the observed one, by L-BFGS.

    As `dlg` with fewer unknowns. The label of one image is certain; those of a batch are estimated. Published with 300 steps of
    L-BFGS, each of several evaluations; ``iterations`` counts evaluations.

    Args:
        iterations: evaluations of each problem, ≥ 1.
        restarts: searches from fresh starts for each update, ≥ 1.
    """

    name: ClassVar[str] = "idlg"
    paper: ClassVar[str] = "Zhao et al. 2020, https://arxiv.org/abs/2001.02610"

    iterations: Annotated[int, Field(ge=1)] = 1000
    restarts: Annotated[int, Field(ge=1)] = 2

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """In the box, from noise around mid grey."""
        return Plan(optimiser=LBFGS(history=50, patience=100), iterations=self.iterations, objective=relative, start=start.grey)
