"""QBI: random rows whose biases let one image in a batch through."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attacks.malicious.crafted_layer import Crafted, CraftedLayerAttack
from flpriv.claim import Goal
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class QBI(CraftedLayerAttack):
    """Sends a dense layer of random rows, each with the bias that one image in a batch exceeds, and reads images off.

    Row k is drawn from a normal distribution and its bias is minus the (1 - 1/batch) quantile of its projections of public
    images (of smooth random ones where none are granted). A neuron that fires for one image of the batch hands it back
    exactly; one that fires for several does once the others are known and taken off.

    Args:
        gain: standard deviation of the projections of public images, averaged over neurons, > 0. Which images fire a neuron
            does not depend on it; small ones round less and disturb the model less, large ones outlast more local steps.
    """

    name: ClassVar[str] = "qbi"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS
    paper: ClassVar[str] = "Nowak et al. 2024, https://arxiv.org/abs/2406.18745"

    gain: Annotated[float, Field(gt=0)] = 1e-3

    def craft(self, images: Tensor, *, neurons: int, rng: torch.Generator) -> Crafted:
        """Normal rows; biases are quantiles of ``images``."""
        weight = torch.randn((neurons, images.shape[1]), generator=rng)
        seen = images @ weight.T
        scale = self.gain / float(seen.std(0).mean().clamp_min(1e-6))
        bias = -torch.quantile(seen, 1 - 1 / self.batch, dim=0)
        return scale * weight, scale * bias
