"""The LeNet that gradient-leakage papers attack."""

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
class LeNet(Model):
    """LeNet of the gradient-leakage literature: three 5×5 convolutions of strides 2, 2 and 1, smooth activation, dense layer.

    Smooth everywhere, so that second derivatives exist for gradient matching; all weights and biases are drawn from a wide
    uniform distribution, without which the sigmoids leave hardly any gradient.

    Args:
        channels: of every convolution, ≥ 1.
        activation: after each convolution.
        spread: initial weights and biases are uniform in [-spread, spread], > 0.
    """

    name: ClassVar[str] = "lenet"
    paper: ClassVar[str] = "Zhu, Liu and Han, Deep Leakage from Gradients, NeurIPS 2019"

    channels: Annotated[int, Field(ge=1)] = 12
    activation: Activation = "sigmoid"
    spread: Annotated[float, Field(gt=0)] = 0.5

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """As :meth:`flpriv.model.Model.build`; keys ``conv1``, ``conv2``, ``conv3``, ``fc``."""
        conv = convolution(spatial_dims(shape, model=self.name))
        features = self.channels * prod(halved(halved(side)) for side in shape[1:])
        model = nn.Sequential(
            OrderedDict(
                conv1=conv(shape[0], self.channels, 5, stride=2, padding=2),
                act1=activation(self.activation),
                conv2=conv(self.channels, self.channels, 5, stride=2, padding=2),
                act2=activation(self.activation),
                conv3=conv(self.channels, self.channels, 5, stride=1, padding=2),
                act3=activation(self.activation),
                flatten=nn.Flatten(),
                fc=nn.Linear(features, classes),
            )
        )
        for parameter in model.parameters():
            nn.init.uniform_(parameter, -self.spread, self.spread)
        return model
