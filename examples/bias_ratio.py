"""An attack in one file: a dense layer's gradient, divided by its bias's gradient, is what went into the layer."""

from dataclasses import dataclass
from math import prod

import torch

from flpriv.attack import Attack
from flpriv.capture import Capture
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class BiasRatio(Attack):
    """Reads images off a dense first layer; a neuron that one image of a batch switched on gives that image exactly.

    Args:
        most: claim no more than this many images of an update, those of the largest bias gradients.
    """

    name = "bias-ratio"
    goal, needs = Goal.RECONSTRUCTION, Can.SEE_UPDATES
    paper = "Phong et al., Privacy-Preserving Deep Learning via Additively Homomorphic Encryption, IEEE TIFS 2018"
    most: int = 32

    def run(self, capture: Capture, *, rng: torch.Generator) -> list[Reconstruction]:
        """One claim for each update."""
        task, claims = capture.task, []
        for seen in capture.observations:
            layer = next((k for k, v in seen.update.items() if v.ndim == 2 and v.shape[1] == prod(task.shape)), None)
            if layer is None:
                raise FlprivError("bias-ratio: the model has no dense layer over whole images")
            weight, bias = (seen.update[key].double() for key in (layer, layer.removesuffix("weight") + "bias"))
            rows = [row for row in bias.abs().argsort(descending=True)[: self.most].tolist() if bias[row] != 0]
            images = (weight[rows] / bias[rows, None]).reshape(-1, *task.shape) * task.std + task.mean
            claims.append(Reconstruction(images=images.clamp(0, 1).float(), round=seen.round, node=seen.node))
        return claims
