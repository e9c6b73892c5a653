"""Class folders, as most public data sets come."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from flpriv.clients.sites.decoding import SUFFIXES
from flpriv.clients.sites.files import SPLITS, FileSites
from flpriv.errors import DataError, ScenarioError
from flpriv.site import Entry, Site, Split


@dataclass(frozen=True, kw_only=True)
class FolderSites(FileSites):
    """Images in one folder per class, divided into virtual sites patient by patient.

    Above the class folders there may be split folders (train, test, val, Training, Testing, …), as in Kaggle's pneumonia X-rays.
    Validation images become the adversary's public images.

    Args:
        root: folder that holds class folders, or split folders with class folders.
        modality: ``"xray"``, ``"ct"``, ``"mri"`` or another word; ``"ct"`` reads NIfTI as HU.
        classes: class folders to use, in label order; all of them by name where not given.
        size: pixels along each axis, one number or one per axis, ``(H, W)`` or ``(D, H, W)``.
        dimensions: 2 for images, 3 for volumes.
        channels: 1 for gray, 3 for RGB.
        window: values shown black and white, HU for CT.
        fit: ``"stretch"``, ``"crop"`` or ``"pad"`` for images of another aspect ratio.
        sites: number of virtual sites.
        partition: ``"iid"`` or ``"dirichlet"``.
        alpha: concentration of the Dirichlet draw, > 0.
        seed: of the partition.
        resplit: forget the split folders, and let ``[sites.split]`` draw splits over all images.
        pattern: regular expression whose first group is the patient in a file's name; a file it does not match is a patient of
            its own. The default knows ``person12_bacteria_45.jpeg`` and ``IM-0012-0001.jpeg``.
    """

    name: ClassVar[str] = "folder"
    partition: Literal["iid", "dirichlet"] = "iid"
    pattern: str = r"^(person\d+|(?:NORMAL2-)?IM-\d+)[_-]"

    def __post_init__(self) -> None:
        FileSites.__post_init__(self)
        try:
            expression = re.compile(self.pattern)
        except re.error as error:
            raise ScenarioError(f"sites.pattern = {self.pattern!r}: {error}") from error
        if expression.groups < 1:
            raise ScenarioError(f"sites.pattern = {self.pattern!r}: needs a group (…) around the patient's name")
        found = sorted({folder.name for _, folder in self._class_folders()})
        if missing := [name for name in self.classes if name not in found]:
            raise DataError(f"{self.root}: no class folder {missing[0]!r}; found: {', '.join(found) or 'none'}")
        if len(found) < 2:
            raise DataError(f"{self.root}: needs two or more class folders; found: {', '.join(found) or 'none'}")
        object.__setattr__(self, "classes", self.classes or tuple(found))

    def list(self) -> tuple[Site, ...]:
        """The virtual sites; an entry's id is its path below the root.

        Raises:
            DataError: if there is no image, too few patients, or a patient in two splits.
        """
        root, expression = self.folder(), re.compile(self.pattern)
        entries = []
        seen: dict[str, Entry] = {}
        for split, folder in self._class_folders():
            if folder.name not in self.classes:
                continue
            for file in self._images(folder):
                match, place = expression.search(file.name), file.relative_to(root).as_posix()
                patient = match[1] if match and match[1] else place
                entry = Entry(
                    id=place, patient=patient, label=self.classes.index(folder.name), split="" if self.resplit else split
                )
                entries.append(entry)
                if (first := seen.setdefault(patient, entry)).split != entry.split:
                    raise DataError(
                        f"{root}: patient {patient!r} is in two splits, {first.id} and {place}; "
                        "set resplit = true, or a pattern that tells them apart"
                    )
        if not entries:
            raise DataError(f"{root}: no image in the class folders; known kinds: {', '.join(SUFFIXES)}")
        return self.virtual(entries, lambda entry: self.image(root / entry.id), how=self.partition)

    def _images(self, folder: Path) -> Iterable[Path]:
        """Image files below a class folder; for volumes, folders of DICOM slices count as one each."""
        files = {path for path in folder.rglob("*") if path.name.lower().endswith(SUFFIXES)}
        if self.dimensions == 3:
            files = {path.parent if path.suffix.lower() == ".dcm" else path for path in files}
        return sorted(files)

    def _class_folders(self) -> Iterator[tuple[Split | Literal[""], Path]]:
        top = _folders(self.folder())
        if top and all(folder.name.lower() in SPLITS for folder in top):
            for folder in top:
                yield from ((SPLITS[folder.name.lower()], below) for below in _folders(folder))
        else:
            yield from (("", folder) for folder in top)


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir() and not path.name.startswith((".", "__")))
