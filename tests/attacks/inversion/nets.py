"""Models for tests of exact inversion, to be named by path: ``f"{NETS}:mlp"``."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor, nn


def mlp(*, inputs: int, widths: tuple[int, ...], classes: int = 2, bias: bool = True) -> nn.Module:
    """Dense layers with ReLUs between them."""
    sizes = (inputs, *widths)
    layers = [part for a, b in itertools.pairwise(sizes) for part in (nn.Linear(a, b, bias=bias), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *layers, nn.Linear(sizes[-1], classes, bias=bias))


def before(*, inputs: int, what: str) -> nn.Module:
    """A dense layer with something before or after it that matters."""
    dense = nn.Linear(inputs, 64)
    middle = {
        "sigmoid": [nn.Flatten(), dense, nn.Sigmoid()],
        "leaky": [nn.Flatten(), dense, nn.LeakyReLU()],
        "norm": [nn.Flatten(), dense, nn.BatchNorm1d(64, affine=False, momentum=0.5), nn.ReLU()],
        "pooled": [nn.AvgPool2d(2), nn.Flatten(), nn.Linear(inputs // 4, 64), nn.ReLU()],
        "dropped": [nn.Flatten(), nn.Dropout(0.3), dense, nn.ReLU(), nn.Dropout(0.3)],
    }[what]
    model = nn.Sequential(*middle, nn.Linear(64, 2))
    for part in model:
        if isinstance(part, nn.BatchNorm1d) and part.running_mean is not None:
            part.running_mean += 1.0
    return model


class Functional(nn.Module):
    """No sequence, no module for the ReLU, and the layers in another order than they run."""

    def __init__(self, *, inputs: int) -> None:
        super().__init__()
        self.last = nn.Linear(64, 3)
        self.first = nn.Linear(inputs, 64)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(torch.relu(self.first(images.flatten(1))))
        return logits


def shallow(*, side: int, activation: str = "relu", channels: int = 8, bias: bool = True) -> nn.Module:
    """One convolution that tells its input several times over, and a dense layer."""
    act = {"relu": nn.ReLU(), "gelu": nn.GELU(), "leaky": nn.LeakyReLU(), "elu": nn.ELU()}[activation]
    return nn.Sequential(nn.Conv2d(1, channels, 3, padding=1), act, nn.Flatten(), nn.Linear(channels * side * side, 2, bias=bias))


def nested(*, side: int) -> nn.Module:
    """Sequences within a sequence: a strided convolution without bias, dense layers with and without."""
    head = nn.Sequential(
        nn.Linear(4 * side * side, 40, bias=False), nn.Tanh(), nn.Linear(40, 30), nn.Softplus(), nn.Linear(30, 3)
    )
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1, bias=False), nn.LeakyReLU(0.2)), nn.Flatten(), head)


def starved(*, side: int) -> nn.Module:
    """A second convolution with too few outputs and weights for its inputs."""
    body = [nn.Conv2d(1, 16, 3, padding=1), nn.LeakyReLU(), nn.Conv2d(16, 2, 3, stride=2, padding=1), nn.LeakyReLU()]
    return nn.Sequential(*body, nn.Flatten(), nn.Linear(2 * (side // 2) ** 2, 2))


def headless(*, side: int) -> nn.Module:
    """No bias in the last layer."""
    return nn.Sequential(nn.Flatten(), nn.Linear(side * side, 16), nn.Tanh(), nn.Linear(16, 2, bias=False))
