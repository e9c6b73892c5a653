"""What the tests of defences share: surroundings and a small loop."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from flpriv.defense import Local, Loop

Surroundings = Callable[..., Local]
Loops = Callable[..., Loop]


@pytest.fixture
def local(tmp_path: Path) -> Surroundings:
    """Surroundings of a site by round and seed, with a folder of its own."""

    def make(round: int = 1, seed: int = 0, folder: Path | None = tmp_path) -> Local:
        return Local(site="A", round=round, rng=torch.Generator().manual_seed(seed), folder=folder)

    return make


@pytest.fixture
def loop() -> Loops:
    """A loop over 24 random images in batches of 4, for any model."""

    def make(model: nn.Module, *, shape: tuple[int, ...] = (1, 8, 8), records: int = 24, batch: int = 4, lr: float = 0.1) -> Loop:
        rng = torch.Generator().manual_seed(3)
        images, labels = torch.rand(records, *shape, generator=rng), torch.arange(records) % 2
        data = TensorDataset(images, labels, torch.arange(records))
        return Loop(
            model=model.train(),
            optimizer=torch.optim.SGD(model.parameters(), lr=lr),
            loader=DataLoader(data, batch_size=batch),
            loss=cross_entropy,
        )

    return make


def train(loop: Loop) -> Iterator[tuple[torch.Tensor, float]]:
    """The bare local loop; yields the rows and the loss of each step."""
    for images, labels, rows in loop.loader:
        loop.optimizer.zero_grad()
        loss = loop.loss(loop.model(images), labels)
        torch.autograd.backward(loss)
        loop.optimizer.step()
        yield rows, float(loss.detach())
    for finish in loop.finish:
        finish()
