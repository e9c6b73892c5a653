"""A site's equipment: a generated chest to the X-ray or the CT volume that this site would archive."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from scipy import ndimage

from flpriv.clients.sites.anatomy import Array, Grid, Patient, hounsfield, spaced

WATER = 0.0185
"""Linear attenuation of water at the beam's effective energy, per millimetre."""

_GLYPHS = {
    "L": ("#....", "#....", "#....", "#....", "#....", "#....", "#####"),
    "R": ("####.", "#...#", "#...#", "####.", "#.#..", "#..#.", "#...#"),
}


@dataclass(frozen=True, kw_only=True)
class Equipment:
    """How a site takes and archives its images.

    Args:
        field: millimetres across the image; pixel spacing is this over the image size.
        blur: detector or kernel blur, standard deviation in pixels.
        sharpen: weight of the unsharp mask of the reconstruction kernel, ≥ 0.
        bone: extra attenuation of bone; higher for lower tube voltage.
        scatter: scattered share of the mean radiation behind the patient.
        photons: X-ray photons per pixel without a patient; fewer are noisier.
        noise: CT noise, standard deviation in HU.
        slices: CT slice thickness, standard deviation in voxels.
        white: X-ray percentile shown white.
        gamma: exponent of the display curve.
        offset: HU added to both ends of the CT window.
        marker: ``"L"``, ``"R"`` or ``""``, burned into the upper corner of that side.
        border: width of the collimated black border, share of the image.
        table: height of the CT table under the back in millimetres.
    """

    field: float = 350.0
    blur: float = 0.4
    sharpen: float = 0.3
    bone: float = 1.0
    scatter: float = 0.25
    photons: float = 4e4
    noise: float = 20.0
    slices: float = 0.4
    white: float = 98.5
    gamma: float = 1.0
    offset: float = 0.0
    marker: Literal["", "L", "R"] = ""
    border: float = 0.0
    table: float = 12.0


@dataclass(frozen=True, kw_only=True)
class Pose:
    """How the patient stands or lies for one image: ``breath`` in [0, 1], and millimetres off centre along x and z."""

    breath: float = 1.0
    x: float = 0.0
    z: float = 0.0


def frame(equipment: Equipment, pose: Pose, *, size: int, dimensions: Literal[2, 3]) -> Grid:
    """The voxels a site images: a plane of ``size`` with depth for an X-ray (2), a cube of ``size`` for CT (3)."""
    field = equipment.field
    depth, count = (field, size) if dimensions == 3 else (280.0, max(24, 5 * size // 8))
    along = spaced(field if dimensions == 2 else 0.9 * field, size)
    return Grid(
        x=spaced(field, size) + np.float32(pose.x),
        y=spaced(depth, count),
        z=along + np.float32(pose.z + (12 if dimensions == 2 else 0)),
    )


def attenuation(volume: Array, *, bone: float = 1.0) -> Array:
    """HU to linear attenuation per millimetre; ``bone`` adds the photoelectric share above 100 HU."""
    return np.asarray(WATER * (1 + (volume + bone * np.maximum(volume - 100, 0)) / 1000), dtype=np.float32)


def projection(volume: Array, depth: float, *, bone: float = 1.0) -> Array:
    """Line integrals of the attenuation from front to back, ``(D, H, W)`` to ``(D, W)``, the head in the first row.

    Args:
        volume: HU.
        depth: millimetres between planes along H.
        bone: as in :func:`attenuation`.
    """
    return np.asarray(attenuation(volume, bone=bone).sum(axis=1)[::-1] * np.float32(depth), dtype=np.float32)


def radiograph(
    patient: Patient, equipment: Equipment, *, size: int, pose: Pose | None = None, rng: np.random.Generator | None = None
) -> Array:
    """A frontal chest X-ray by Beer–Lambert projection of the patient: ``(size, size)`` in [0, 1], bone bright.

    Without ``rng`` there is no noise.
    """
    pose = pose or Pose()
    grid = frame(equipment, pose, size=size, dimensions=2)
    volume = hounsfield(patient, grid, breath=pose.breath)
    primary = np.exp(-projection(volume, float(grid.y[1] - grid.y[0]), bone=equipment.bone))
    glare = ndimage.gaussian_filter(primary, 0.15 * size, mode="nearest")
    behind = min(float(np.median(primary[size // 4 : -size // 4])), float(glare.mean()))
    signal = ndimage.gaussian_filter(primary, equipment.blur) + equipment.scatter * 0.5 * (behind + 0.1 * glare)
    if rng is not None:
        signal = signal + rng.normal(size=signal.shape) * np.sqrt(signal / equipment.photons)
    image = _sharpened(-np.log(np.maximum(signal, 1e-4)), equipment)
    middle = slice(size // 4, -size // 4)
    black, white = 0.65 * np.percentile(image[middle, middle], 5), np.percentile(image, equipment.white)
    image = np.clip((image - black) / (white - black), 0, 1) ** equipment.gamma
    return _marked(_collimated(image.astype(np.float32), equipment), equipment)


def tomogram(
    patient: Patient, equipment: Equipment, *, size: int, pose: Pose | None = None, rng: np.random.Generator | None = None
) -> Array:
    """A chest CT in the lung window: ``(size, size, size)`` in [0, 1], axes to the head, the back and the left.

    Without ``rng`` there is no noise.
    """
    pose = pose or Pose()
    grid = frame(equipment, pose, size=size, dimensions=3)
    volume = hounsfield(patient, grid, breath=pose.breath)
    _table(volume, grid, equipment)
    volume = ndimage.gaussian_filter(volume, (equipment.slices, equipment.blur, equipment.blur))
    if rng is not None:
        grain = ndimage.gaussian_filter1d(rng.normal(size=volume.shape).astype(np.float32), equipment.slices, axis=0)
        volume = volume + equipment.noise * grain / max(float(grain.std()), 1e-6)
    volume = _sharpened(volume, equipment)
    outside = np.hypot(grid.y[:, None], grid.x[None, :] - pose.x) > equipment.field / 2
    image = (volume + 1000 - equipment.offset) / 1400
    return np.where(outside[None], 0, np.clip(image, 0, 1)).astype(np.float32)


def _sharpened(image: Array, equipment: Equipment) -> Array:
    width = (0,) * (image.ndim - 2) + (1.2, 1.2)
    return np.asarray(image + equipment.sharpen * (image - ndimage.gaussian_filter(image, width)), dtype=np.float32)


def _collimated(image: Array, equipment: Equipment) -> Array:
    width = round(equipment.border * len(image))
    if width:
        image[:width] = image[-width:] = image[:, :width] = image[:, -width:] = 0
    return image


def _marked(image: Array, equipment: Equipment) -> Array:
    """The lead letter in the corner of its side; the patient's left is on the image's right."""
    if equipment.marker:
        scale = max(1, len(image) // 64)
        glyph = np.array([[c == "#" for c in row] for row in _GLYPHS[equipment.marker]]).repeat(scale, 0).repeat(scale, 1)
        top = round(equipment.border * len(image)) + 3 * scale
        left = top if equipment.marker == "R" else len(image) - top - glyph.shape[1]
        image[top : top + glyph.shape[0], left : left + glyph.shape[1]][glyph] = 1
    return image


def _table(volume: Array, grid: Grid, equipment: Equipment) -> None:
    """A curved carbon-fibre table under the back."""
    back = grid.y[np.flatnonzero((volume > -300).any(axis=(0, 2)))[-1]]
    height = grid.y[:, None] - (back + equipment.table - (grid.x[None, :] / 34.0) ** 2)
    edge = float(grid.y[1] - grid.y[0])
    share = np.clip(0.5 + (5 - np.abs(height)) / edge, 0, 1) * (np.abs(grid.x) < 200)
    np.maximum(volume, (-1000 + 750 * share[None]).astype(np.float32), out=volume)
