"""Networks with their kinks rounded off, so that a search can follow slopes.

Where a ReLU switches, the gradient of the weights jumps: what a deep network sends is full of cliffs, and a second-order search
ends at the first. With each ReLU replaced by ``(v + sqrt(v² + 1/s²)) / 2`` (squareplus, Barron 2021,
https://arxiv.org/abs/2112.11687) there are none, and the error made falls as the sharpness s grows: a search that raises s step
by step (a homotopy) arrives where none that starts on the real network does.
"""

from __future__ import annotations

import copy
import math

from torch import Tensor, nn


class Rounded(nn.Module):
    """A (leaky) ReLU without its kink.

    Args:
        sharpness: s > 0; the largest error, ``1 / 2s``, is at 0.
        slope: of the negative side, in [0, 1).
    """

    def __init__(self, *, sharpness: float, slope: float = 0.0) -> None:
        super().__init__()
        self.sharpness, self.slope = sharpness, slope

    def forward(self, value: Tensor) -> Tensor:
        """Element by element."""
        rounded = (value + (value.square() + self.sharpness**-2).sqrt()) / 2
        return self.slope * value + (1 - self.slope) * rounded if self.slope else rounded


def kinks(model: nn.Module) -> int:
    """How many activations of ``model`` can be rounded off; those a forward method calls as functions cannot."""
    return sum(_kinked(module) for module in model.modules())


def smoothed(model: nn.Module, sharpness: float) -> nn.Module:
    """A copy of ``model`` with its (leaky) ReLUs rounded off; ``model`` itself where ``sharpness`` is infinite."""
    if math.isinf(sharpness):
        return model
    model = copy.deepcopy(model)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if _kinked(child):
                slope = child.negative_slope if isinstance(child, nn.LeakyReLU) else 0.0
                setattr(module, name, Rounded(sharpness=sharpness, slope=slope))
    return model


def _kinked(module: nn.Module) -> bool:
    return type(module) in (nn.ReLU, nn.LeakyReLU)
