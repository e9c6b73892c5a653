"""See through gradients: squared distance, batch statistics of the model, and restarts that agree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import batch_norm
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import DISTANCES, Distance
from flpriv.attacks.inversion.plan import Hint, Plan
from flpriv.attacks.inversion.regularisers import squared_norm, total_variation
from flpriv.attacks.inversion.search import Adam
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class SeeThroughGradients(MatchingAttack):
    """GradInversion: images kept to the running statistics of the model sent, and restarts drawn to what they agree on.

    Running statistics are a prior worth having for large batches and from the second round on: an untrained model has gathered
    none, and few images are not what the many were. Published with 20,000 iterations, and with weights of .1 (``bn``) and .01
    (``group``) for an absolute squared distance; here it counts as a share of the update's own square.

    Args:
        restarts: searches from fresh starts for each update, ≥ 1; what they agree on draws them together.
        distance: how updates are compared, published ``"l2"``. It fails on trained models, whose small updates are far from those
            of any first trial; ``"cosine"`` does not mind.
        lr: first step of Adam, on images in [0, 1].
        langevin: noise on the slope, in units of the step, ≥ 0.
        tv: weight of the total variation, ≥ 0.
        norm: weight of the mean squared pixel, ≥ 0.
        bn: weight of the distance to the running statistics, ≥ 0; the first layer counts tenfold.
        group: weight of the squared distance to the mean of the restarts, ≥ 0.
    """

    name: ClassVar[str] = "see-through-gradients"
    paper: ClassVar[str] = "Yin et al. 2021, https://arxiv.org/abs/2104.07586"

    restarts: Annotated[int, Field(ge=1)] = 4
    distance: Distance = "l2"
    lr: Annotated[float, Field(gt=0)] = 0.1
    langevin: Annotated[float, Field(ge=0)] = 0.01
    tv: Annotated[float, Field(ge=0)] = 1e-4
    norm: Annotated[float, Field(ge=0)] = 1e-6
    bn: Annotated[float, Field(ge=0)] = 1e-3
    group: Annotated[float, Field(ge=0)] = 1.0

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """Cosine schedule from uniform noise; restarts that are alone have nobody to agree with."""
        site, sent = evidence.site, evidence.seen.sent
        prior = Hint(weight=self.bn, read=batch_norm.gathered, penalty=batch_norm.apart(site, sent, first=10))
        return Plan(
            optimiser=Adam(
                lr=self.lr, signed="none", schedule="cosine", warmup=50, langevin=self.langevin, patience=self.iterations
            ),
            iterations=self.iterations,
            objective=DISTANCES[self.distance],
            regularisers=((self.tv, total_variation), (self.norm, squared_norm)),
            hints=(prior,) if batch_norm.layers(site, sent) else (),
            consensus=self.group if self.restarts > 1 else 0.0,
        )
