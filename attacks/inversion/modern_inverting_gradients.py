"""Inverting gradients with later refinements: soft signs, a patterned start, and the features that the last layer gives away."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import features, start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.plan import Hint, Plan
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.search import Adam
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class ModernInvertingGradients(MatchingAttack):
    """Inverting gradients with softened signs, a cosine schedule, and images kept to the features of the last dense layer.

    The settings that the breaching library calls modern, published with 24,000 iterations. A model without a last dense layer
    with bias gives no features away, and the search goes without.

    Args:
        lr: first step of Adam, on images in [0, 1].
        warmup: evaluations over which the step grows.
        tile: side in pixels of the random patch that the start repeats, ≥ 1.
        tv: weight of the total variation, ≥ 0; less suits deep networks.
        feature: weight of the mean squared distance to the features read from the update, ≥ 0.
    """

    name: ClassVar[str] = "modern-inverting-gradients"
    paper: ClassVar[str] = "Geiping et al. 2020, https://arxiv.org/abs/2003.14053; https://github.com/JonasGeiping/breaching"

    lr: Annotated[float, Field(gt=0)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = 50
    tile: Annotated[int, Field(ge=1)] = 4
    tv: Annotated[float, Field(ge=0)] = 0.1
    feature: Annotated[float, Field(ge=0)] = 0.1

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """Features are hints to the search only where there is a layer to read them from."""
        layer = features.last_layer(evidence.site, classes=len(capture.task.classes))
        hints: tuple[Hint, ...] = ()
        if layer is not None:
            hints = (Hint(weight=self.feature, read=features.told(layer), penalty=features.apart(evidence.site, layer)),)
        return Plan(
            optimiser=Adam(lr=self.lr, signed="soft", schedule="cosine", warmup=self.warmup, patience=self.iterations),
            iterations=self.iterations,
            regularisers=((self.tv, total_variation),),
            hints=hints,
            start=start.tiled(self.tile),
        )
