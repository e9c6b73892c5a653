"""Client privacy leakage: matching from a patterned start, towards the label."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import one_hot

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.plan import Hint, Plan
from flpriv.attacks.inversion.received import answered
from flpriv.attacks.inversion.regularisers import squared_norm
from flpriv.attacks.inversion.search import LBFGS
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class CPL(MatchingAttack):
    """Finds images whose update is the observed one by L-BFGS from a patterned start, with the model's answers near the labels.

    The pull towards the label keeps searches from straying and costs precision at the end. Published with 300 steps of L-BFGS,
    each of several evaluations; ``iterations`` counts evaluations.

    Args:
        iterations: evaluations of each problem, ≥ 1.
        restarts: searches from fresh starts for each update, ≥ 1.
        tile: side in pixels of the random patch that the start repeats, ≥ 1.
        label: weight of the squared distance between the model's probabilities and the label, ≥ 0.
        norm: weight of the mean squared pixel, ≥ 0.
    """

    name: ClassVar[str] = "cpl"
    paper: ClassVar[str] = "Wei et al. 2020, https://arxiv.org/abs/2004.10397"

    iterations: Annotated[int, Field(ge=1)] = 1000
    restarts: Annotated[int, Field(ge=1)] = 2
    tile: Annotated[int, Field(ge=1)] = 16
    label: Annotated[float, Field(ge=0)] = 1e-4
    norm: Annotated[float, Field(ge=0)] = 1e-6

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """In the box, from a geometric pattern."""
        site, classes = evidence.site, len(capture.task.classes)
        near_label = Hint(
            weight=self.label,
            read=lambda evidence, labels: [one_hot(labels, classes).float()],
            penalty=lambda images, known: _apart(answered(site, images), known[0]),
        )
        return Plan(
            optimiser=LBFGS(history=50, patience=100),
            iterations=self.iterations,
            objective=relative,
            regularisers=((self.norm, squared_norm),),
            hints=(near_label,),
            start=start.tiled(self.tile),
        )


def _apart(logits: Tensor, hot: Tensor) -> Tensor:
    return (logits.softmax(1) - hot).square().sum(1).mean()
