"""Latent prior: a search over the latents of a decoder learned from public images, then over pixels."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.autoencoder import Autoencoder
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.plan import Plan, Space
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.rehearsal import best
from flpriv.attacks.inversion.restoration import Restoration
from flpriv.attacks.inversion.search import Adam
from flpriv.attacks.inversion.simulation import known_images
from flpriv.capture import Capture
from flpriv.threat import Can

WEIGHTS = (0.001, 0.003, 0.01, 0.03, 0.1)
"""Of the total variation, to choose from."""


@dataclass(frozen=True, kw_only=True)
class LatentPrior(MatchingAttack):
    """Searches where a decoder makes likely images, refines what it found pixel by pixel, and restores its detail.

    A small autoencoder takes the place of the paper's generative adversarial network, which a few hundred images cannot train,
    and pixels the place of its generator's weights. Whatever is learned is learned from public images: the decoder, how
    smooth images should be where the sites' defences leave noise, and what the search gets wrong.

    Args:
        iterations: of the search over pixels, ≥ 1.
        coarse: of the search over latents before it, ≥ 1.
        lr: first step over pixels; over latents, of size 1, it is .1.
        tv: weight of the total variation, ≥ 0; by default the one of .001 … .1 that brings public images back best.
        rehearsed: updates of public images that ``tv`` is chosen by.
        restore: finish with a restoration network.
        simulated: updates of public images that the network learns from.
        training: steps of its training, and of the autoencoder's.
    """

    name: ClassVar[str] = "latent-prior"
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL | Can.KNOW_PUBLIC
    paper: ClassVar[str] = "Jeon et al., Gradient Inversion with Generative Image Prior, NeurIPS 2021 (arXiv 2110.14962)"

    iterations: Annotated[int, Field(ge=1)] = 100
    coarse: Annotated[int, Field(ge=1)] = 40
    lr: Annotated[float, Field(gt=0)] = 0.03
    tv: Annotated[float, Field(ge=0)] | None = None
    rehearsed: Annotated[int, Field(ge=1)] = 3
    restore: bool = True
    simulated: Annotated[int, Field(ge=1)] = 24
    training: Annotated[int, Field(ge=1)] = 400

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """From the mean public image, first over latents, then over pixels."""
        public = known_images(capture, who=self.name).images
        decoder = Autoencoder(steps=self.training).space(public, device=evidence.labels.device)
        weights = WEIGHTS if self.tv is None else (self.tv,)
        plans = {f"tv={tv:g}": self._plan(tv, decoder, public.mean(0)) for tv in weights}
        key = {"attack": self.name, "options": (self.iterations, self.coarse, self.lr, self.training)}
        name = best(plans, evidence, capture, updates=self.rehearsed, key=key)
        plan = plans[name]
        if not self.restore or plan.then is None:
            return plan
        training = Restoration(updates=self.simulated, steps=self.training)
        finish = training.of(plan, evidence, capture, key={**key, "plan": name})
        return replace(plan, then=replace(plan.then, finish=finish))

    def _plan(self, tv: float, decoder: Space, mean: torch.Tensor) -> Plan:
        smooth = ((tv, total_variation),)
        return Plan(
            optimiser=Adam(lr=0.1, signed="none", schedule="cosine", floor=0.1, box=False),
            iterations=self.coarse,
            regularisers=smooth,
            start=start.image(mean),
            space=decoder,
            then=Plan(optimiser=Adam(lr=self.lr, schedule="cosine"), iterations=self.iterations, regularisers=smooth),
        )
