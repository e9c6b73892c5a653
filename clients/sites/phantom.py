"""Generated hospitals: no data needed, nobody's privacy at stake, and every fact about every patient known."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

import numpy as np
from pydantic import Field

from flpriv.clients.sites.acquisition import Equipment, Pose, radiograph, tomogram
from flpriv.clients.sites.anatomy import Array, Patient
from flpriv.seeds import derive
from flpriv.site import Entry, Site, Sites


@dataclass(frozen=True, kw_only=True)
class PhantomSites(Sites):
    """Generated chest X-rays (2D) or CT volumes (3D) of hospitals that differ in equipment and patients.

    A patient is a 3D chest in Hounsfield units; an X-ray is its Beer–Lambert projection, so that both belong together. The task
    is to find masses in the lungs; two in three patients who have them also have fluid at the lung's base.

    Args:
        sites: number of hospitals.
        patients: patients of each; about four in ten have two images.
        size: pixels or voxels along each axis.
        dimensions: 2 for X-rays ``(1, size, size)``, 3 for CT ``(1, size, size, size)`` with axes to head, back and left.
        classes: names of the two classes, without and with masses.
        site_effect: how much equipment and patients differ between hospitals; 0 for not at all.
        seed: of everything.
    """

    name: ClassVar[str] = "phantom"
    sites: Annotated[int, Field(ge=1, le=1000)] = 4
    patients: Annotated[int, Field(ge=2)] = 40
    size: Annotated[int, Field(ge=16, le=512)] = 64
    dimensions: Literal[2, 3] = 2
    classes: tuple[str, str] = ("healthy", "lesion")
    site_effect: Annotated[float, Field(ge=0, le=2)] = 1.0
    seed: int = 0
    modality: str = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "modality", "xray" if self.dimensions == 2 else "ct")

    @property
    def shape(self) -> tuple[int, ...]:
        """``(1, size, size)`` or ``(1, size, size, size)``."""
        return (1, *(self.size,) * self.dimensions)

    def list(self) -> tuple[Site, ...]:
        """The hospitals, named ``hospital-1`` and so on; each image's id says hospital, patient and visit."""
        return tuple(self._site(place) for place in range(self.sites))

    def equipment(self, place: int) -> Equipment:
        """The scanner of the hospital at index ``place``."""
        part = self._differences("equipment", place, 11)
        return Equipment(
            field=350 + 36 * part[0],
            blur=0.5 + 0.5 * part[1],
            sharpen=0.5 + 0.8 * part[2],
            bone=1.0 + 0.7 * part[3],
            scatter=0.28 + 0.3 * part[4],
            photons=10 ** (4.3 + 1.2 * part[5]),
            noise=24 * 4 ** part[5],
            slices=0.5 + 0.6 * part[6],
            white=98.0 + 2.4 * part[7],
            gamma=float(np.exp(0.5 * part[8])),
            offset=110 * part[9],
            marker=("", "L", "R")[(place + derive(self.seed, "marker") % 3) % 3 if self.site_effect else 0],
            border=max(0.0, 0.12 * part[10]),
            table=14 + 16 * part[10],
        )

    def patient(self, place: int, number: int) -> Patient:
        """Patient ``number`` of the hospital at index ``place``."""
        rng = np.random.default_rng(derive(self.seed, "patient", place, number))
        older, women, ill = self._differences("patients", place, 3)
        return Patient(
            sex="F" if rng.random() < 0.5 + 0.3 * women else "M",
            age=float(np.clip(round(rng.normal(55 + 22 * older, 17)), 18, 92)),
            lesions=int(rng.integers(1, 4)) if rng.random() < 0.5 + 0.25 * ill else 0,
            seed=derive(self.seed, "anatomy", place, number),
        )

    def _site(self, place: int) -> Site:
        equipment, people = self.equipment(place), [self.patient(place, number) for number in range(self.patients)]
        name = f"hospital-{place + 1}"
        entries, taken = [], {}
        for number, person in enumerate(people):
            for visit in range(1 + (derive(self.seed, "visits", place, number) % 10 < 4)):
                patient = f"{name}-p{number + 1:04d}"
                entry = Entry(
                    id=f"{patient}-{visit + 1}",
                    patient=patient,
                    label=int(person.lesions > 0),
                    attributes={"sex": person.sex, "age": f"{person.age:.0f}"},
                )
                entries.append(entry)
                taken[entry.id] = person, derive(self.seed, "image", place, number, visit)
        return Site(name=name, entries=tuple(entries), read=lambda entry: self._image(*taken[entry.id], equipment))

    def _image(self, person: Patient, seed: int, equipment: Equipment) -> Array:
        rng = np.random.default_rng(seed)
        pose = Pose(breath=float(rng.uniform(0.75, 1)), x=float(rng.normal(0, 7)), z=float(rng.normal(0, 7)))
        take = radiograph if self.dimensions == 2 else tomogram
        return take(person, equipment, size=self.size, pose=pose, rng=rng)[None]

    def _differences(self, what: str, place: int, count: int) -> tuple[float, ...]:
        """``count`` numbers in [-0.5, 0.5] times ``site_effect``, spread evenly over the hospitals (a Latin hypercube)."""
        spread = []
        for number in range(count):
            order = np.random.default_rng(derive(self.seed, what, number)).permutation(self.sites)
            spread.append(float(self.site_effect * ((order[place] + 0.5) / self.sites - 0.5)))
        return tuple(spread)
