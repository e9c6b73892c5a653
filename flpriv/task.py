"""What the federation learns: modality, image shape, classes and the model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, kw_only=True)
class Task:
    """The public facts every participant agrees on; an adversary knows them too.

    Args:
        modality: ``"xray"``, ``"ct"``, ``"mri"`` or another word for reports.
        shape: one image, ``(C, H, W)`` or ``(C, D, H, W)``.
        classes: names of the classes, in label order.
        model: a registered model name, or an import path ``"package.module:factory"``.
        options: keyword options of the model.
        mean: subtracted from images in [0, 1] before the first layer.
        std: divides them after that.
        changes: (defence name, options) of the defences whose ``architecture`` the whole federation agreed on, in order.
        plugins: files that bring the model or those defences, where flpriv and installed packages do not.
    """

    modality: str
    shape: tuple[int, ...]
    classes: tuple[str, ...]
    model: str
    options: Mapping[str, Any] = field(default_factory=dict)
    mean: float = 0.0
    std: float = 1.0
    changes: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    plugins: tuple[str, ...] = ()

    @property
    def spatial(self) -> tuple[int, ...]:
        """``(H, W)`` or ``(D, H, W)``."""
        return self.shape[1:]

    def build(self, *, seed: int = 0) -> nn.Module:
        """A fresh model with initial weights drawn from ``seed``; the global random state is left as it was.

        It takes images ``(N, *shape)`` in [0, 1] and gives logits ``(N, classes)``; normalisation happens inside, in a
        forward pre-hook that adds no keys to the state.

        Raises:
            ScenarioError: for an unknown model or options it does not take.
        """
        import torch

        from flpriv.registry import build_model, create

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build_model(self)
            for name, options in self.changes:
                model = create("defenses", name, options, files=map(Path, self.plugins)).architecture(model)
        if (self.mean, self.std) != (0.0, 1.0):
            mean, std = self.mean, self.std
            model.register_forward_pre_hook(lambda _, args: ((args[0] - mean) / std, *args[1:]))
        return model
