"""The vision transformer, as MONAI lays it out, for images and volumes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.clients.models.layers import spatial_dims
from flpriv.errors import ScenarioError
from flpriv.model import Model

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, kw_only=True)
class ViT(Model):
    """Vision transformer: patches become tokens, a class token beside them gathers what the logits are read from.

    Patch embedding and MLPs are MONAI's; layers, keys and initial weights are those of MONAI's ``ViT``, which wants a
    package of its own for its attention and returns more than logits. The embedding alone sees the image, patch by patch.

    Args:
        patch: side of a patch in pixels, ≥ 1; every side of an image needs to be a multiple of it.
        hidden: length of a token, ≥ 1, a multiple of ``heads``.
        mlp: hidden neurons of each block's MLP, ≥ 1.
        layers: number of blocks, ≥ 1.
        heads: of the attention, ≥ 1.
        dropout: share of activations dropped, in [0, 1).
    """

    name: ClassVar[str] = "vit"
    paper: ClassVar[str] = "Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021 (arXiv 2010.11929)"

    patch: Annotated[int, Field(ge=1)] = 8
    hidden: Annotated[int, Field(ge=1)] = 128
    mlp: Annotated[int, Field(ge=1)] = 256
    layers: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0

    def __post_init__(self) -> None:
        """Refuse tokens that the heads cannot share."""
        if self.hidden % self.heads:
            raise ValueError(f"hidden = {self.hidden} is no multiple of heads = {self.heads}")

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """As :meth:`flpriv.model.Model.build`; keys as in MONAI's ``ViT``.

        Raises:
            ScenarioError: for another shape, or a side that is no multiple of a patch.
        """
        spatial_dims(shape, model=self.name, at_least=self.patch)
        if any(side % self.patch for side in shape[1:]):
            raise ScenarioError(
                f"model {self.name!r}: images of shape {shape}; every side needs to be a multiple of patch = {self.patch}"
            )
        return Transformer(shape, self, classes=classes)


class Transformer(nn.Module):
    """``(N, C, *spatial)`` to ``(N, classes)``.

    Args:
        shape: of one image.
        options: of the model.
        classes: number of classes.
    """

    def __init__(self, shape: Sequence[int], options: ViT, *, classes: int) -> None:
        from monai.networks.blocks.patchembedding import PatchEmbeddingBlock

        super().__init__()
        self.patch_embedding = PatchEmbeddingBlock(
            in_channels=shape[0],
            img_size=tuple(shape[1:]),
            patch_size=options.patch,
            hidden_size=options.hidden,
            num_heads=options.heads,
            proj_type="conv",
            dropout_rate=options.dropout,
            spatial_dims=len(shape) - 1,
        )
        self.blocks = nn.ModuleList([Block(options) for _ in range(options.layers)])
        self.norm = nn.LayerNorm(options.hidden)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, options.hidden))
        self.classification_head = nn.Linear(options.hidden, classes)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        patches: Tensor = self.patch_embedding(images)
        tokens = torch.cat((self.cls_token.expand(len(images), -1, -1), patches), dim=1)
        for block in self.blocks:
            tokens = block(tokens)
        logits: Tensor = self.classification_head(self.norm(tokens)[:, 0])
        return logits


class Block(nn.Module):
    """``(N, tokens, hidden)`` to the same: attention and an MLP, each after a norm and beside a shortcut."""

    def __init__(self, options: ViT) -> None:
        from monai.networks.blocks.mlp import MLPBlock

        super().__init__()
        self.mlp = MLPBlock(options.hidden, options.mlp, options.dropout)
        self.norm1 = nn.LayerNorm(options.hidden)
        self.attn = Attention(options.hidden, heads=options.heads, dropout=options.dropout)
        self.norm2 = nn.LayerNorm(options.hidden)

    def forward(self, tokens: Tensor) -> Tensor:
        """The tokens after the block."""
        tokens = tokens + self.attn(self.norm1(tokens))
        done: Tensor = tokens + self.mlp(self.norm2(tokens))
        return done


class Attention(nn.Module):
    """Attention of all tokens to all, in several heads.

    Args:
        hidden: length of a token.
        heads: they share it evenly.
        dropout: of the weights and of the output.
    """

    def __init__(self, hidden: int, *, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.out_proj = nn.Linear(hidden, hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.drop_output, self.drop_weights = nn.Dropout(dropout), nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        """What each token gathers of the others, ``(N, tokens, hidden)``."""
        q, k, v = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        weights = self.drop_weights((q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1))
        gathered: Tensor = self.drop_output(self.out_proj((weights @ v).transpose(1, 2).flatten(2)))
        return gathered
