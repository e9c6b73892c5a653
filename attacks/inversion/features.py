"""Features: what the last layer received, read from its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.received import received
from flpriv.attacks.inversion.unroll import Replay


def last_layer(site: Replay, *, classes: int) -> str | None:
    """The name of the last dense layer with a bias and one row a class, both of them trained; ``None`` where there is none."""
    if site.recipe.optimizer != "sgd":
        return None
    dense = [
        name for name, module in site.model.named_modules() if isinstance(module, nn.Linear) and module.out_features == classes
    ]
    return next((name for name in reversed(dense) if {f"{name}.weight", f"{name}.bias"} <= site.start.keys()), None)


def told(layer: str) -> Callable[[Evidence, Tensor], list[Tensor]]:
    """Reads from an update which features its images have: ``mixing`` ``(N, N)`` and ``features`` ``(N, F)``.

    Image i adds ``dᵢ fᵢᵀ`` to the gradient of the last layer's weight and ``dᵢ = pᵢ - onehot(yᵢ)`` to that of its bias: one image
    gives its features away exactly. In a batch the probabilities are taken to be alike, as they are at initial weights,
    and ``mixing @ f = features`` states what then follows: as many combinations as the labels tell apart, those of images of
    one label together (the row of each image's label alone is exact only where no other class answers).
    After several local steps this is an estimate.
    """

    def read(evidence: Evidence, labels: Tensor) -> list[Tensor]:
        site = evidence.site
        update = dict(zip(site.start, evidence.target, strict=True))
        momentum, steps = site.recipe.momentum, len(site.batches)
        weight = sum((1 - momentum ** (step + 1)) / (1 - momentum) for step in range(steps))
        mean = [
            (update[name] / weight - site.recipe.weight_decay * site.start[name]).double()
            for name in (f"{layer}.weight", f"{layer}.bias")
        ]
        hot = one_hot(labels, len(mean[1])).double()
        force = mean[1] + hot.mean(0) - hot
        inverse = torch.linalg.pinv(force.T / len(labels), rtol=1e-2)
        mixing, features = inverse @ force.T / len(labels), inverse @ mean[0]
        return [mixing.to(update[f"{layer}.bias"].dtype), features.to(update[f"{layer}.bias"].dtype)]

    return read


def apart(site: Replay, layer: str) -> Callable[[Tensor, Sequence[Tensor]], Tensor]:
    """A penalty: the mean squared distance between the features of trial images ``(N, C, *spatial)`` and those told."""

    def penalty(images: Tensor, known: Sequence[Tensor]) -> Tensor:
        mixing, features = known
        own = torch.cat([inputs[0] for inputs in received(site, images, [layer]).values()])
        return (mixing @ own - features).square().mean()

    return penalty
