"""Batch-norm aware inversion: a site that trains in train mode returns the statistics of its own batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import batch_norm, start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import DISTANCES, Distance
from flpriv.attacks.inversion.plan import Hint, Plan
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.search import Adam
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class BNAware(MatchingAttack):
    """Finds images whose update is the observed one and whose batch statistics are those that the running statistics give away.

    Batch statistics go out with every reply of a site that trains in train mode; one that trains in eval mode sends none, and the
    search goes without. It begins at the mean public image, where the adversary holds public images. Published with 40,000
    iterations and a ``bn`` of .1 beside 1e-3 times the absolute squared distance; here it counts as a share of the update's own.

    Args:
        distance: how updates are compared, published ``"l2"``. It fails on trained models, whose small updates are far from those
            of any first trial; ``"cosine"`` does not mind.
        lr: first step of Adam, on images in [0, 1].
        bn: weight of the distance to the batch statistics of the update, ≥ 0; they are exact, so more does no harm.
        tv: weight of the total variation, ≥ 0.
    """

    name: ClassVar[str] = "bn-aware"
    paper: ClassVar[str] = "Hatamizadeh et al. 2022, https://arxiv.org/abs/2202.06924"

    distance: Distance = "l2"
    lr: Annotated[float, Field(gt=0)] = 0.1
    bn: Annotated[float, Field(ge=0)] = 1.0
    tv: Annotated[float, Field(ge=0)] = 1e-4

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """Cosine schedule from the mean public image, or from grey without public images."""
        site, sent, public = evidence.site, evidence.seen.sent, capture.public
        own = Hint(weight=self.bn, read=batch_norm.left, penalty=batch_norm.apart(site, sent))
        leaks = site.recipe.train_mode and batch_norm.layers(site, sent)
        return Plan(
            optimiser=Adam(lr=self.lr, signed="none", schedule="cosine", patience=self.iterations),
            iterations=self.iterations,
            objective=DISTANCES[self.distance],
            regularisers=((self.tv, total_variation),),
            hints=(own,) if leaks else (),
            start=start.grey if public is None or not len(public) else start.image(public.images.mean(0)),
        )
