"""Models with a hidden dense layer, to be named by path: ``f"{NETS}:strided"``."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def strided(*, channels: int = 1, width: int = 8, side: int = 16, dims: int = 2) -> nn.Module:
    """A convolution of stride 1, one of stride 2, two dense layers."""
    conv = nn.Conv2d if dims == 2 else nn.Conv3d
    half = (side + 1) // 2
    return nn.Sequential(
        conv(channels, width, 5, padding=2),
        nn.LeakyReLU(),
        conv(width, 2 * width, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(2 * width * half**dims, 128),
        nn.ReLU(),
        nn.Linear(128, 2),
    )


class Pooled(nn.Module):
    """The network of many federated-learning papers: two pooled convolutions, two dense layers; no module for the ReLUs."""

    def __init__(self, *, side: int = 32) -> None:
        super().__init__()
        self.out = nn.Linear(256, 2)
        self.conv1, self.conv2 = nn.Conv2d(1, 8, 5, padding=2), nn.Conv2d(8, 16, 5, padding=2)
        self.hidden = nn.Linear(16 * (side // 4) ** 2, 256)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        seen = F.max_pool2d(torch.relu(self.conv1(images)), 2)
        seen = F.max_pool2d(torch.relu(self.conv2(seen)), 2)
        logits: Tensor = self.out(torch.relu(self.hidden(seen.flatten(1))))
        return logits


def blocked(*, what: str, side: int = 16) -> nn.Module:
    """Two dense layers behind something that keeps the image from them, or between which no ReLU stands."""
    size, middle = side**2, nn.ReLU() if what != "sigmoid" else nn.Sigmoid()
    options: dict[str, list[nn.Module]] = {
        "norm": [nn.Conv2d(1, 1, 3, padding=1), nn.BatchNorm2d(1)],
        "tanh": [nn.Conv2d(1, 1, 3, padding=1), nn.Tanh(), nn.Hardshrink(0.7)],
        "sigmoid": [],
        "average": [nn.Conv2d(1, size, 3, padding=1), nn.AdaptiveAvgPool2d(1)],
        "mirror": [nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular")],
    }
    return nn.Sequential(*options[what], nn.Flatten(), nn.Linear(size, 64), middle, nn.Linear(64, 2))
