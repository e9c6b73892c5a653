"""A source of sites and a model small enough for tests."""

from __future__ import annotations

import zlib
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from torch import nn

from flpriv.model import Model
from flpriv.site import Entry, Site, Sites, Split


@dataclass(frozen=True, kw_only=True)
class TinySites(Sites):
    """Sites named ``clinic 0``, ``clinic 1``, …: seeded noise with a bright square where the label is 1, one image a patient.

    Args:
        modality: as in reports.
        classes: two.
        sites: how many.
        train: training images a site.
        test: test images a site.
        size: shape of an image.
        unreadable: id of an image that cannot be read.
    """

    name: ClassVar[str] = "tiny"

    modality: str = "xray"
    classes: tuple[str, ...] = ("healthy", "ill")
    sites: int = 3
    train: int = 10
    test: int = 6
    size: tuple[int, ...] = (1, 8, 8)
    unreadable: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.size

    def list(self) -> tuple[Site, ...]:
        return tuple(self._site(number) for number in range(self.sites))

    def _site(self, number: int) -> Site:
        splits: list[Split] = ["train" if row < self.train else "test" for row in range(self.train + self.test)]
        names = [f"{number}-{row}" for row in range(len(splits))]
        entries = tuple(
            Entry(id=name, patient=f"patient {name}", label=int(row % 3 == 0), split=split)
            for row, (name, split) in enumerate(zip(names, splits, strict=True))
        )
        return Site(name=f"clinic {number}", entries=entries, read=self._read)

    def _read(self, entry: Entry) -> object:
        if entry.id == self.unreadable:
            raise OSError(f"/secret/path/{entry.id}.png is truncated")
        image = np.random.default_rng(zlib.crc32(entry.id.encode())).random(self.size, dtype=np.float32) * 0.5
        image[..., 2:4, 2:4] += 0.5 * entry.label
        return image


@dataclass(frozen=True, kw_only=True)
class DroppingModel(Model):
    """Logistic regression on half of the pixels, drawn anew in each step."""

    name: ClassVar[str] = "dropping"
    paper: ClassVar[str] = ""

    def build(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(int(np.prod(shape)), classes))
