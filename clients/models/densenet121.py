"""DenseNet-121 of MONAI, for images and volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import nn

from flpriv.clients.models.layers import spatial_dims
from flpriv.clients.models.residual import out_of_place
from flpriv.model import Model


@dataclass(frozen=True, kw_only=True)
class DenseNet121(Model):
    """DenseNet-121 of MONAI in 2D or 3D, without in-place arithmetic; every side of an image needs at least 32 pixels.

    Args:
        dropout: share of activations dropped after each dense layer, in [0, 1).
    """

    name: ClassVar[str] = "densenet121"
    paper: ClassVar[str] = "Huang et al., Densely Connected Convolutional Networks, CVPR 2017"

    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """As :meth:`flpriv.model.Model.build`; keys as in MONAI's ``DenseNet121``."""
        from monai.networks.nets.densenet import DenseNet121 as Network

        return out_of_place(
            Network(
                spatial_dims=spatial_dims(shape, model=self.name, at_least=32),
                in_channels=shape[0],
                out_channels=classes,
                dropout_prob=self.dropout,
            )
        )
