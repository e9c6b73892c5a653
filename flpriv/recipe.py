"""The local recipe: how a site trains on what it receives."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import ConfigDict, Field


@dataclass(frozen=True, kw_only=True)
class LocalRecipe:
    """How each site trains in a round.

    Args:
        optimizer: ``"sgd"`` or ``"adam"``.
        lr: learning rate, > 0.
        momentum: of SGD, in [0, 1).
        weight_decay: L2 penalty, ≥ 0.
        batch_size: records in a local step, ≥ 1; the last batch of an epoch may be smaller.
        epochs: passes over the site's training records; ignored where ``steps`` is set.
        steps: exact number of local steps; ``None`` trains whole epochs. ``steps=1`` is FedSGD.
        loss: ``"cross-entropy"``, or ``"balanced-cross-entropy"`` (weights inverse to the site's class frequencies, mean 1).
        train_mode: train with the model in train mode (dropout and batch statistics on); ``False`` keeps it in eval mode.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    optimizer: Literal["sgd", "adam"] = "sgd"
    lr: Annotated[float, Field(gt=0)] = 0.05
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.0
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    batch_size: Annotated[int, Field(ge=1)] = 16
    epochs: Annotated[int, Field(ge=1)] = 1
    steps: Annotated[int, Field(ge=1)] | None = None
    loss: Literal["cross-entropy", "balanced-cross-entropy"] = "cross-entropy"
    train_mode: bool = True
