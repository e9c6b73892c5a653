"""Sites: whose images, which patients, and how they are split. A source of sites is a plugin that lists them."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field

from flpriv.errors import DataError

if TYPE_CHECKING:
    from flpriv.records import Records

Split = Literal["train", "test", "public"]


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One image of a site before it is read.

    Args:
        id: unique within the federation, and stable from run to run.
        patient: whose image it is; several entries may share a patient.
        label: class index.
        split: ``"train"``, ``"test"``, ``"public"``, or ``""`` to let the scenario's patient-level split decide.
        attributes: ``"sex"`` (``"F"``/``"M"``), ``"age"`` (years) and others, ``""`` where unknown.
    """

    id: str
    patient: str
    label: int
    split: Split | Literal[""] = ""
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A hospital: a name, its entries, and a way to read one image.

    Args:
        name: as in reports.
        entries: in a fixed order.
        read: entry to image, a float32 array or tensor of the source's ``shape`` in [0, 1].
    """

    name: str
    entries: tuple[Entry, ...]
    read: Callable[[Entry], object]

    def select(self, split: Split) -> tuple[Entry, ...]:
        """The entries of one split."""
        return tuple(entry for entry in self.entries if entry.split == split)


class Sites(ABC):
    """A source of sites: a frozen dataclass whose fields are its options. A plugin writes :meth:`list` and the three facts.

    Reading images is lazy and happens per site, so that a machine which holds one site's data opens that site alone.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: ClassVar[str]
    modality: str
    classes: tuple[str, ...]

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """One image, ``(C, H, W)`` or ``(C, D, H, W)``."""

    @abstractmethod
    def list(self) -> tuple[Site, ...]:
        """All sites, in a fixed order, without reading images.

        Raises:
            DataError: naming the file, row or column that is wrong.
        """


@dataclass(frozen=True, kw_only=True)
class SplitPlan:
    """How patients are divided where the source does not say; always whole patients.

    Args:
        test: share of each site's patients held out for evaluation (the non-members).
        public: share of each site's patients that the adversary holds as public images; they belong to no audited site.
        seed: of the draw.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    test: Annotated[float, Field(ge=0, lt=1)] = 0.25
    public: Annotated[float, Field(ge=0, lt=1)] = 0.15
    seed: int = 0


def split_patients(sites: Sequence[Site], plan: SplitPlan) -> tuple[Site, ...]:
    """Give every entry a split, patient by patient; a patient with a split already keeps it for all images, at every site.

    The draw depends on the seed and the patients' ids alone, so it is the same on any machine.

    Raises:
        DataError: if a patient has entries in two splits, or a site ends without training entries.
    """
    decided = _given_splits(sites)
    done = []
    for site in sites:
        decided |= _draw({entry.patient for entry in site.entries} - decided.keys(), plan)
        entries = tuple(replace(entry, split=decided[entry.patient]) for entry in site.entries)
        if not any(entry.split == "train" for entry in entries):
            raise DataError(f"site {site.name!r}: no training image is left; lower sites.split.test or sites.split.public")
        done.append(replace(site, entries=entries))
    return tuple(done)


def load(site: Site, split: Split, *, shape: tuple[int, ...]) -> Records:
    """Read all images of one split, with attributes ``"site"`` and whatever the entries carry.

    Raises:
        DataError: naming the site and the entry whose image has another shape, NaN, or values outside [0, 1].
    """
    import numpy as np
    import torch

    from flpriv.records import Records

    entries = site.select(split)
    images = np.empty((len(entries), *shape), dtype=np.float32)
    for row, entry in enumerate(entries):
        image = np.asarray(site.read(entry), dtype=np.float32)
        if image.shape != shape:
            raise DataError(f"site {site.name!r}: image {entry.id!r} has shape {image.shape}, expected {shape}")
        if not np.isfinite(image).all():
            raise DataError(f"site {site.name!r}: image {entry.id!r} holds NaN or infinite values")
        if image.size and (image.min() < -1e-3 or image.max() > 1 + 1e-3):
            raise DataError(
                f"site {site.name!r}: image {entry.id!r} has values from {image.min():g} to {image.max():g}, not in [0, 1]"
            )
        images[row] = image
    names = sorted({key for entry in site.entries for key in entry.attributes} - {"site"})
    return Records(
        images=torch.from_numpy(images),
        labels=torch.tensor([entry.label for entry in entries], dtype=torch.long),
        ids=tuple(entry.id for entry in entries),
        patients=tuple(entry.patient for entry in entries),
        attributes={"site": (site.name,) * len(entries)}
        | {key: tuple(entry.attributes.get(key, "") for entry in entries) for key in names},
    )


def _given_splits(sites: Sequence[Site]) -> dict[str, Split]:
    """Each patient's split where the source says it."""
    first: dict[str, Entry] = {}
    given: dict[str, Split] = {}
    for site in sites:
        for entry in site.entries:
            if not entry.split:
                continue
            known = first.setdefault(entry.patient, entry)
            if known.split != entry.split:
                raise DataError(
                    f"site {site.name!r}: patient {entry.patient!r} is in two splits: {known.id!r} in {known.split!r}, "
                    f"{entry.id!r} in {entry.split!r}; give all images of a patient the same split"
                )
            given[entry.patient] = entry.split
    return given


def _draw(patients: Iterable[str], plan: SplitPlan) -> dict[str, Split]:
    order = sorted(patients, key=lambda patient: hashlib.sha256(f"{plan.seed}/{patient}".encode()).hexdigest())
    test, public = round(plan.test * len(order)), round(plan.public * len(order))
    return {
        patient: "test" if place < test else "public" if place < test + public else "train" for place, patient in enumerate(order)
    }
