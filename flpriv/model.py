"""The contract of a model: options in, a PyTorch module for images of a given shape out."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, ClassVar

from pydantic import ConfigDict

if TYPE_CHECKING:
    from torch import nn


class Model(ABC):
    """A model family: a frozen dataclass whose fields are its options. A plugin writes :meth:`build`.

    Class attributes: ``name`` (as in scenarios), ``paper``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: ClassVar[str]
    paper: ClassVar[str]

    @abstractmethod
    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """A module from images ``(N, *shape)`` to logits ``(N, classes)``, initial weights from the global random state.

        Args:
            shape: one image, ``(C, H, W)`` or ``(C, D, H, W)``.
            classes: number of classes.

        Raises:
            ScenarioError: for a shape the model cannot take.
        """
