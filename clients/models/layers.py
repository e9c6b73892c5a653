"""Layers by name and by the number of spatial dimensions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from torch import nn

from flpriv.errors import ScenarioError

Activation = Literal["relu", "leaky-relu", "elu", "gelu", "softplus", "sigmoid", "tanh"]

_ACTIVATIONS: dict[Activation, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leaky-relu": nn.LeakyReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "softplus": nn.Softplus,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
}


def activation(name: Activation) -> nn.Module:
    """The activation layer of that name, never in place."""
    return _ACTIVATIONS[name]()


def spatial_dims(shape: tuple[int, ...], *, model: str, at_least: int = 1) -> int:
    """2 for images ``(C, H, W)``, 3 for volumes ``(C, D, H, W)``.

    Raises:
        ScenarioError: for another shape, or a side shorter than ``at_least`` pixels.
    """
    if len(shape) not in (3, 4):
        raise ScenarioError(f"model {model!r}: images of shape {shape}; it takes (C, H, W) or (C, D, H, W)")
    if min(shape[1:]) < at_least:
        raise ScenarioError(f"model {model!r}: images of shape {shape}; every side needs at least {at_least} pixels")
    return len(shape) - 1


def convolution(dims: int) -> type[nn.Conv2d] | type[nn.Conv3d]:
    """The convolution over 2 or 3 spatial dimensions."""
    return nn.Conv2d if dims == 2 else nn.Conv3d


def halved(side: int) -> int:
    """Length of a side after a "same"-padded convolution of stride 2."""
    return (side + 1) // 2
