"""Trap weights: rows that nearly cancel, so that few images of a batch get through each neuron."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attacks.malicious.crafted_layer import Crafted, CraftedLayerAttack
from flpriv.claim import Goal
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class TrapWeights(CraftedLayerAttack):
    """Sends a dense layer of rows negative on a random half of the pixels and less positive on the rest; reads images off.

    With v ~ N(0, sigma²), a random half of the pixels weighs -|v| and the other half scale·|v|; biases are zero. A neuron that
    fires for one image of the batch hands it back exactly; one that fires for several does once the others are known.

    Args:
        variant: ``"cah"`` as published; ``"mic-dkfz"`` weighs v by -1 and by scale without taking absolute values, in effect
            random projections, of which most fire for many images.
        sigma: standard deviation of v, > 0; the paper has 0.5. Which images fire a neuron does not depend on it; small ones round
            less and disturb the model less, large ones outlast more local steps.
        scale: of the positive half, in (0, 1]. ``None`` takes 0.01 for ``"mic-dkfz"`` and the scale at which a pair of neuron and
            public image (smooth random ones where none are granted) fires with chance 1/batch for ``"cah"``, which is the
            (1/batch) quantile over all pairs of what the negative half takes off over what the other half adds.
    """

    name: ClassVar[str] = "trap-weights"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS
    paper: ClassVar[str] = "Boenisch et al. 2023, https://arxiv.org/abs/2112.02918"

    variant: Literal["cah", "mic-dkfz"] = "cah"
    sigma: Annotated[float, Field(gt=0)] = 1e-3
    scale: Annotated[float, Field(gt=0, le=1)] | None = None

    def craft(self, images: Tensor, *, neurons: int, rng: torch.Generator) -> Crafted:
        """Rows of both halves and no bias; the scale by the option, or measured on ``images``."""
        pixels = images.shape[1]
        v = self.sigma * torch.randn((neurons, pixels), generator=rng)
        negative = torch.rand((neurons, pixels), generator=rng).argsort(1) < pixels // 2
        if self.variant == "mic-dkfz":
            return torch.where(negative, -v, (self.scale or 0.01) * v), torch.zeros(neurons)
        off, on = torch.where(negative, v.abs(), 0), torch.where(negative, 0, v.abs())
        scale = self.scale or _scale(images @ off.T, images @ on.T, share=1 / self.batch)
        return scale * on - off, torch.zeros(neurons)


def _scale(off: Tensor, on: Tensor, *, share: float) -> float:
    """The scale at which ``scale * on > off`` for this share of all pairs."""
    needed = (off / on.clamp_min(1e-12)).flatten().double().sort().values
    return float(needed[min(len(needed) - 1, round(share * len(needed)))])
