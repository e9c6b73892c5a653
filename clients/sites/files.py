"""What all sources of stored images share: the shape they are read to, and how collections become sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from flpriv.clients.sites.decoding import Array
from flpriv.clients.sites.partition import divide
from flpriv.clients.sites.reading import Fit, read_image
from flpriv.errors import DataError, ScenarioError
from flpriv.site import Entry, Site, Sites, Split

SPLITS: dict[str, Split] = {
    "train": "train",
    "training": "train",
    "test": "test",
    "testing": "test",
    "val": "public",
    "valid": "public",
    "validation": "public",
    "public": "public",
}
"""Names of splits as data sets spell them; validation images are what an adversary may hold as public."""


@dataclass(frozen=True, kw_only=True)
class FileSites(Sites):
    """Base of the sources that read image files; a plugin adds :meth:`list`.

    Args:
        root: folder or file with the images, ``${NAME}`` being an environment variable.
        modality: ``"xray"``, ``"ct"``, ``"mri"`` or another word; ``"ct"`` reads NIfTI as HU.
        classes: class names in label order; those found where not given.
        size: pixels along each axis, one number or one per axis, ``(H, W)`` or ``(D, H, W)``.
        dimensions: 2 for images, 3 for volumes.
        channels: 1 for gray, 3 for RGB.
        window: values shown black and white, HU for CT.
        fit: ``"stretch"``, ``"crop"`` or ``"pad"`` for images of another aspect ratio.
        sites: number of virtual sites where the images name none.
        alpha: concentration of the Dirichlet draw, > 0.
        seed: of the partition.
        resplit: forget the splits the images come with, and let ``[sites.split]`` draw them.
    """

    root: str
    modality: str = "xray"
    classes: tuple[str, ...] = ()
    size: Annotated[int, Field(ge=4, le=2048)] | tuple[Annotated[int, Field(ge=4, le=2048)], ...] = 64
    dimensions: Literal[2, 3] = 2
    channels: Literal[1, 3] = 1
    window: tuple[float, float] | None = None
    fit: Fit = "stretch"
    sites: Annotated[int, Field(ge=1, le=1000)] = 4
    alpha: Annotated[float, Field(gt=0)] = 0.5
    seed: int = 0
    resplit: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.size, tuple) and len(self.size) != self.dimensions:
            raise ScenarioError(
                f"sites.size = {list(self.size)}: give one number, or {self.dimensions} as dimensions = {self.dimensions}"
            )
        if self.window and self.window[0] >= self.window[1]:
            raise ScenarioError(f"sites.window = {list(self.window)}: give the value shown black, then a larger one shown white")
        if len(set(self.classes)) < len(self.classes) or len(self.classes) == 1:
            raise ScenarioError(f"sites.classes = {list(self.classes)}: give two or more different names")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(C, H, W)`` or ``(C, D, H, W)``."""
        return (self.channels, *(self.size if isinstance(self.size, tuple) else (self.size,) * self.dimensions))

    def virtual(
        self, entries: Sequence[Entry], read: Callable[[Entry], object], *, how: Literal["iid", "dirichlet"]
    ) -> tuple[Site, ...]:
        """Virtual sites ``site-1``, ``site-2``, … of whole patients.

        Raises:
            DataError: if there are too few patients.
        """
        parts = divide(entries, self.sites, how=how, alpha=self.alpha, seed=self.seed)
        return tuple(Site(name=f"site-{place}", entries=part, read=read) for place, part in enumerate(parts, start=1))

    def image(self, path: Path) -> Array:
        """The image in ``path``, of the source's shape in [0, 1].

        Raises:
            DataError: naming the file.
        """
        return read_image(path, shape=self.shape, window=self.window, modality=self.modality, fit=self.fit)

    def folder(self) -> Path:
        """The root.

        Raises:
            DataError: if there is no such folder.
        """
        root = Path(self.root)
        if not root.is_dir():
            raise DataError(f"{root}: no such folder; set sites.root, or --set sites.root=PATH")
        return root
