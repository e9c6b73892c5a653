"""MONAI's networks without in-place arithmetic, as per-sample gradients and gradient matching need them.

Backward hooks (Opacus) and double backward fail where a layer's output is changed in place; MONAI's residual blocks do
``out += residual`` and its activations are in place by default. Weights, keys and outputs stay the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)
Layer = Callable[[Tensor], Tensor]


def out_of_place(model: M) -> M:
    """Make every activation and every residual block of MONAI within ``model`` work out of place; returns ``model``."""
    for module in model.modules():
        if isinstance(getattr(module, "inplace", None), bool):
            module.__dict__["inplace"] = False
        if type(module).__module__.startswith("monai.") and type(module).__name__ in _BLOCKS:
            module.__class__ = _BLOCKS[type(module).__name__]
    return model


class BasicBlock(nn.Module):
    """``monai.networks.nets.resnet.ResNetBlock`` with an out-of-place sum; made by :func:`out_of_place` alone."""

    conv1: Layer
    bn1: Layer
    conv2: Layer
    bn2: Layer
    act: Layer
    downsample: Layer | None

    def forward(self, x: Tensor) -> Tensor:
        """Two convolutions and the shortcut."""
        out = self.act(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.act(out + (x if self.downsample is None else self.downsample(x)))


class Bottleneck(BasicBlock):
    """``monai.networks.nets.resnet.ResNetBottleneck`` with an out-of-place sum; made by :func:`out_of_place` alone."""

    conv3: Layer
    bn3: Layer

    def forward(self, x: Tensor) -> Tensor:
        """Three convolutions and the shortcut."""
        out = self.act(self.bn1(self.conv1(x)))
        out = self.act(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.act(out + (x if self.downsample is None else self.downsample(x)))


class SegBlock(nn.Module):
    """``monai.networks.blocks.segresnet_block.ResBlock`` with an out-of-place sum; made by :func:`out_of_place` alone."""

    norm1: Layer
    conv1: Layer
    norm2: Layer
    conv2: Layer
    act: Layer

    def forward(self, x: Tensor) -> Tensor:
        """Two normalised convolutions and the shortcut."""
        out = self.conv1(self.act(self.norm1(x)))
        return self.conv2(self.act(self.norm2(out))) + x


_BLOCKS = {"ResNetBlock": BasicBlock, "ResNetBottleneck": Bottleneck, "ResBlock": SegBlock}
