"""The small CNN of the gradient-inversion experiments."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from math import prod
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from flpriv.clients.models.layers import Activation, activation, convolution, halved, spatial_dims
from flpriv.model import Model


@dataclass(frozen=True, kw_only=True)
class CNN(Model):
    """Small CNN: 3×3 convolution, 3×3 convolution of stride 2, dense layer.

    Two convolutions without normalisation or dropout: small enough to invert, large enough to learn from X-rays of 64 pixels.

    Args:
        width: channels of the first convolution, ≥ 1; the second has twice as many.
        activation: after each convolution.
    """

    name: ClassVar[str] = "cnn"
    paper: ClassVar[str] = ""

    width: Annotated[int, Field(ge=1)] = 32
    activation: Activation = "relu"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """As :meth:`flpriv.model.Model.build`; keys ``conv1``, ``conv2``, ``fc``."""
        conv = convolution(spatial_dims(shape, model=self.name))
        features = 2 * self.width * prod(map(halved, shape[1:]))
        return nn.Sequential(
            OrderedDict(
                conv1=conv(shape[0], self.width, 3, padding=1),
                act1=activation(self.activation),
                conv2=conv(self.width, 2 * self.width, 3, stride=2, padding=1),
                act2=activation(self.activation),
                flatten=nn.Flatten(),
                fc=nn.Linear(features, classes),
            )
        )
