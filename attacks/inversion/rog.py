"""ROG: a coarse latent against obfuscated updates, then a learned restoration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import squared
from flpriv.attacks.inversion.plan import Plan, Space
from flpriv.attacks.inversion.restoration import Restoration
from flpriv.attacks.inversion.search import Adam
from flpriv.capture import Capture
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class ROG(MatchingAttack):
    """Searches for a coarse image by squared distance, which obfuscated updates still tell, then restores its detail.

    The search goes through what is known of the sites' defences. The restoration network is ours: it learns from public images
    whose updates are simulated, protected as the sites do and attacked in the same way.

    Args:
        iterations: of the search, ≥ 1.
        lr: first step of Adam, on latents in [0, 1]; a cosine leads to a tenth of it.
        scale: pixels of the image for one of the latent, along each axis.
        restore: finish with the restoration network.
        simulated: updates of public images that it learns from.
        training: steps of its training.
    """

    name: ClassVar[str] = "rog"
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL | Can.KNOW_PUBLIC
    paper: ClassVar[str] = (
        "Yue et al., Gradient Obfuscation Gives a False Sense of Security in Federated Learning, USENIX Security 2023 "
        "(arXiv 2206.04055)"
    )

    iterations: Annotated[int, Field(ge=1)] = 100
    lr: Annotated[float, Field(gt=0)] = 0.05
    scale: Annotated[int, Field(ge=1)] = 4
    restore: bool = True
    simulated: Annotated[int, Field(ge=1)] = 24
    training: Annotated[int, Field(ge=1)] = 400

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """As published, but for the network."""
        plan = Plan(
            optimiser=Adam(lr=self.lr, signed="none", schedule="cosine", floor=0.1),
            iterations=self.iterations,
            objective=squared,
            space=coarse(capture.task.spatial, scale=self.scale, device=evidence.labels.device),
        )
        if not self.restore:
            return plan
        key = {"attack": self.name, "iterations": self.iterations, "lr": self.lr, "scale": self.scale}
        training = Restoration(updates=self.simulated, steps=self.training)
        return replace(plan, finish=training.of(plan, evidence, capture, key=key))


def coarse(spatial: Sequence[int], *, scale: int, device: torch.device) -> Space:
    """Images searched for at a ``scale``-th of their size along each axis, enlarged bicubically, volumes trilinearly.

    A first trial takes every ``scale``-th pixel of the first image, so that it has the same distribution.
    """
    mode = "cubic" if len(spatial) == 2 else "linear"
    enlarge = [_matrix(-(-side // scale), side, mode).to(device) for side in spatial]

    def decode(trial: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        for axis, matrix in enumerate(enlarge, start=2):
            trial = (trial.movedim(axis, -1) @ matrix).movedim(-1, axis)
        return trial, labels

    def encode(images: Tensor, labels: Tensor) -> Tensor:
        for axis in range(2, images.dim()):
            images = images.index_select(axis, torch.arange(0, images.shape[axis], scale, device=images.device))
        return images

    return Space(encode=encode, decode=decode)


def _matrix(short: int, long: int, mode: str) -> Tensor:
    """``(short, long)``: interpolation along one axis as a product."""
    if mode == "linear":
        return functional.interpolate(torch.eye(short)[None], size=long, mode="linear")[0]
    return functional.interpolate(torch.eye(short)[None, None], size=(short, long), mode="bicubic")[0, 0]
