"""MedMNIST files: one npz with images, labels and splits."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from flpriv.clients.sites.decoding import Array, Raw
from flpriv.clients.sites.files import SPLITS, FileSites
from flpriv.clients.sites.reading import to_shape, windowed
from flpriv.errors import DataError
from flpriv.site import Entry, Site


@dataclass(frozen=True, kw_only=True)
class NpzSites(FileSites):
    """A MedMNIST file (2D or 3D) divided into virtual sites; every image counts as a patient of its own.

    The file's splits stay; validation images become the adversary's public images.

    Args:
        root: the npz file, with ``train_images``, ``train_labels`` and the same for ``val`` and ``test``.
        modality: ``"xray"``, ``"ct"``, ``"mri"`` or another word.
        classes: class names in label order; ``"0"``, ``"1"``, … where not given.
        size: pixels along each axis, one number or one per axis, ``(H, W)`` or ``(D, H, W)``.
        dimensions: 2 for images, 3 for volumes.
        channels: 1 for gray, 3 for RGB.
        window: values shown black and white; 0 and 255 for 8-bit files.
        fit: ``"stretch"``, ``"crop"`` or ``"pad"`` for images of another aspect ratio.
        sites: number of virtual sites.
        partition: ``"iid"`` or ``"dirichlet"``.
        alpha: concentration of the Dirichlet draw, > 0.
        seed: of the partition.
        resplit: forget the file's splits, and let ``[sites.split]`` draw splits over all images.
        limit: use at most this many images of each split, the first ones; 0 for all.
    """

    name: ClassVar[str] = "npz"
    partition: Literal["iid", "dirichlet"] = "iid"
    limit: Annotated[int, Field(ge=0)] = 0

    def __post_init__(self) -> None:
        FileSites.__post_init__(self)
        highest = max(int(labels.max()) for _, labels in self._labels())
        if self.classes and highest >= len(self.classes):
            raise DataError(f"{self.root}: holds label {highest}, but sites.classes names only {len(self.classes)} classes")
        object.__setattr__(self, "classes", self.classes or tuple(str(label) for label in range(max(highest, 1) + 1)))

    def list(self) -> tuple[Site, ...]:
        """The virtual sites; an entry's id is split and row, ``train/17``.

        Raises:
            DataError: if the file is no such file, or there are too few images.
        """
        entries = []
        for split, labels in self._labels():
            for row, label in enumerate(labels[: self.limit or None].tolist()):
                place = f"{split}/{row}"
                entries.append(Entry(id=place, patient=place, label=label, split="" if self.resplit else SPLITS[split]))
        return self.virtual(entries, self._image, how=self.partition)

    def _labels(self) -> Iterator[tuple[str, NDArray[np.int64]]]:
        found = False
        for split in ("train", "val", "test"):
            labels = _member(Path(self.root), f"{split}_labels")
            if labels is None:
                continue
            found = True
            if labels.ndim == 2 and labels.shape[1] == 1:
                labels = labels[:, 0]
            if labels.ndim != 1 or labels.dtype.kind not in "iu" or not len(labels) or labels.min() < 0:
                raise DataError(f"{self.root}: {split}_labels of shape {labels.shape} are not one class number per image")
            yield split, labels.astype(np.int64)
        if not found:
            raise DataError(f"{self.root}: has no train_labels, val_labels or test_labels; is it a MedMNIST file?")

    def _image(self, entry: Entry) -> Array:
        split, row = entry.id.split("/")
        images = _member(Path(self.root), f"{split}_images")
        if images is None or int(row) >= len(images):
            raise DataError(f"{self.root}: {split}_images has no row {row}")
        values = images[int(row)]
        color = values.ndim == self.dimensions + 1 and values.shape[-1] == 3
        if values.ndim - color != self.dimensions:
            raise DataError(f"{self.root}: images of shape {values.shape} are not {self.dimensions}D; set dimensions")
        shown = (0.0, 255.0) if values.dtype == np.uint8 else None
        raw = Raw(values=values.astype(np.float32), shown=shown, spacing=(1.0,) * self.dimensions, color=color)
        return to_shape(windowed(raw, window=self.window, modality=self.modality), shape=self.shape, fit=self.fit)


@lru_cache(maxsize=6)
def _member(file: Path, key: str) -> NDArray[Any] | None:
    """One array of the file, decompressed once per process; ``None`` where there is none."""
    if not file.is_file():
        raise DataError(f"{file}: no such npz file; set sites.root, or --set sites.root=PATH")
    try:
        with np.load(file) as archive:
            return np.asarray(archive[key]) if key in archive.files else None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"{file}: cannot be read as npz: {error}") from error
