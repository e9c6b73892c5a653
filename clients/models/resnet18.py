"""ResNet-18 of MONAI, for images and volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from torch import nn

from flpriv.clients.models.layers import spatial_dims
from flpriv.clients.models.residual import out_of_place
from flpriv.model import Model


@dataclass(frozen=True, kw_only=True)
class ResNet18(Model):
    """ResNet-18 of MONAI in 2D or 3D, without in-place arithmetic (per-sample gradients work).

    Args:
        widen: factor on all channels, > 0; 1 is the published 64, 128, 256, 512.
        stem_stride: stride of the first 7×7 convolution; 2 as published, 1 keeps small images large.
        max_pool: whether the stem ends in a max pooling of stride 2.
        norm: ``"batch"`` as published, or ``"group"``, as DP-SGD wants it: there are no running statistics to average over sites
            that are unlike one another.
    """

    name: ClassVar[str] = "resnet18"
    paper: ClassVar[str] = "He et al., Deep Residual Learning for Image Recognition, CVPR 2016"

    widen: Annotated[float, Field(gt=0)] = 1.0
    stem_stride: Literal[1, 2] = 1
    max_pool: bool = True
    norm: Literal["batch", "group"] = "batch"

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """As :meth:`flpriv.model.Model.build`; keys as in MONAI's ``resnet18``."""
        from monai.networks.nets.resnet import ResNet

        built = out_of_place(
            ResNet(
                block="basic",
                layers=[2, 2, 2, 2],
                block_inplanes=[64, 128, 256, 512],
                spatial_dims=spatial_dims(shape, model=self.name),
                n_input_channels=shape[0],
                conv1_t_stride=self.stem_stride,
                no_max_pool=not self.max_pool,
                widen_factor=self.widen,
                num_classes=classes,
            )
        )
        if self.norm == "batch":
            return built
        from opacus.validators import ModuleValidator

        grouped: nn.Module = ModuleValidator.fix(built)
        return grouped
