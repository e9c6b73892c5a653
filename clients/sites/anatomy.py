"""A generated chest: one patient's organs in Hounsfield units, on any grid of millimetres.

The patient's axes: x to the left (0 in the midline), y to the back, z to the head (0 in the middle of the chest).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Point = tuple[float, float, float]
Box = tuple[slice, slice, slice]

AIR, FAT, MUSCLE, BLOOD, LUNG, MASS, FLUID = -1000.0, -95.0, 50.0, 60.0, -850.0, 45.0, 15.0
"""HU of the tissues that have one value."""


@dataclass(frozen=True, kw_only=True)
class Patient:
    """Whom to draw.

    Args:
        sex: ``"F"`` has breasts and a smaller chest, ``"M"`` not.
        age: years; older patients have thinner bone, a rounder back, a wider aorta and heart, and emptier lungs.
        lesions: number of masses in the lungs; 0 for a healthy patient.
        seed: of build, organ sizes, vessels and the places of the masses.
    """

    sex: Literal["F", "M"]
    age: float
    lesions: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class Grid:
    """Voxel centres in millimetres: ``x`` (W,), ``y`` (H,), ``z`` (D,), each ascending and evenly spaced."""

    x: Array
    y: Array
    z: Array


def spaced(length: float, count: int) -> Array:
    """``count`` voxel centres that divide ``length`` millimetres around 0."""
    return np.asarray(((np.arange(count) + 0.5) / count - 0.5) * length, dtype=np.float32)


def hounsfield(patient: Patient, grid: Grid, *, breath: float = 1.0) -> Array:
    """The patient as ``(D, H, W)`` HU from -1000 (air) to about 900 (bone), deterministic.

    Args:
        patient: whom to draw.
        grid: where; organs keep their size in millimetres whatever the grid.
        breath: depth of inspiration; 1 is full, 0 is out: the diaphragm stands higher.
    """
    return _Chest(patient, grid, breath).draw()


class _Chest:
    """Organs painted one over the other into one volume, each edge a voxel wide."""

    def __init__(self, patient: Patient, grid: Grid, breath: float) -> None:
        self.rng = rng = np.random.default_rng(patient.seed)
        self.patient, self.female = patient, patient.sex == "F"
        old = self.old = float(np.clip((patient.age - 35) / 50, 0, 1))
        size = (0.92 if self.female else 1.0) * rng.normal(1, 0.03)
        self.fat = float(np.clip(rng.gamma(4, 3.6) + (4 if self.female else 0), 5, 34))
        self.width = 133 * size * rng.normal(1, 0.02)
        self.depth = (80 + 15 * old) * size * rng.normal(1, 0.04)
        self.top = 136 * size * rng.normal(1, 0.015)
        self.floor = (-98 - 10 * old * rng.random()) * size + 45 * (1 - breath)
        self.dome = float(np.clip(rng.normal(46, 6), 30, 58)) * (1 - 0.5 * old * rng.random())
        self.emphysema = old * rng.random()
        self.heart = rng.normal(1, 0.06) * (1 + 0.14 * old) * (0.92 if self.female else 1.0)
        self.aorta = rng.normal(1, 0.06) * (1 + 0.35 * old)
        self.bone = rng.normal(1, 0.05) * (1 - 0.45 * old) * (0.93 if self.female else 1.0)
        self.breast = float(np.clip(rng.normal(0.9, 0.2), 0.45, 1.3)) * (0.85 + self.fat / 70)
        self.curve = 8 + 30 * old * rng.random()
        self.axes = grid.z, grid.y, grid.x
        self.edge = max(float(np.diff(grid.x[:2])[0]), 1.0)
        self.z = grid.z[:, None, None]
        self.y = grid.y[None, :, None] - self._bend(self.z)
        self.x = grid.x[None, None, :]
        self.volume = np.full((len(grid.z), len(grid.y), len(grid.x)), AIR, dtype=np.float32)

    def draw(self) -> Array:
        self._body()
        cavity = self._cavity(self.x, self.y, self.z)
        below = self._diaphragm(self.x, self.y[:1] + self._bend(self.z[:1])) - self.z
        self._paint(np.maximum(cavity + 2, below), FAT + 30)
        self._paint(self._outside_lung(self.x, self.y, self.z, cavity, below), self._lung())
        self._vessels()
        if self.patient.lesions:
            self._effusion(self._outside_lung(self.x, self.y, self.z, cavity, below))
        self._mediastinum()
        self._abdomen()
        self._skeleton(cavity)
        if self.female:
            self._breasts()
        self._masses()
        return self.volume

    def _body(self) -> None:
        chest, back = self.width + 17 + self.fat, self.depth + 16 + 0.8 * self.fat
        heights = (-60.0, 30.0, 85.0, 112.0, 134.0, 156.0, 190.0)
        for rim, tissue in ((0.0, FAT), (self.fat, MUSCLE)):
            wide = _profile(self.z, heights, (chest, chest, chest + 18, 196, 158, 82, 66)) - np.float32(0.8 * rim)
            deep = _profile(self.z, heights, (back, back, back, 84, 72, 62, 60)) - np.float32(0.75 * rim)
            across, along = np.abs(self.x / wide) ** np.float32(2.7), np.abs(self.y / deep) ** np.float32(2.5)
            self._paint((across + along - 1) * (deep / np.float32(2.5)), tissue)

    def _cavity(self, x: Array, y: Array, z: Array) -> Array:
        """Millimetres outside the inner wall of the rib cage; negative inside."""
        rise = np.clip((z + 25) / (self.top + 25), 0, 1)
        shape = np.sqrt(np.maximum(1 - rise**2.3, 0.002)) * (1 + 0.03 * np.clip(-z / 100, 0, 1))
        wide, deep = self.width * shape, self.depth * shape**0.8
        a, b = x / wide, (y - 2) / deep
        squared_a, squared_b = a**2, b**2
        slope = np.sqrt(squared_a / wide**2 + squared_b / deep**2) + np.float32(5e-5)
        return np.asarray((squared_a + squared_b - 1) / (2 * slope), dtype=np.float32)

    def _bend(self, z: Array) -> Array:
        """Millimetres by which the back's curve moves the chest backwards at a height."""
        return np.asarray(self.curve * (0.4 - (z / 150) ** 2), dtype=np.float32)

    def _outside_lung(self, x: Array, y: Array, z: Array, cavity: Array, below: Array) -> Array:
        """Millimetres outside the lungs, negative inside, given those outside the rib cage and below the diaphragm."""
        middle = _profile(z, (-110, -40, 20, 60, 100, 140), (34, 32, 27, 25, 27, 33))
        wrapped = middle * (0.3 + 0.75 * np.exp(-(((y - 12) / 42) ** 2)))
        return np.asarray(np.maximum(np.maximum(cavity, below), wrapped - np.abs(x)), dtype=np.float32)

    def _outside_lung_at(self, points: NDArray[np.float64]) -> Array:
        """The same for ``(N, 3)`` points x, y, z of the patient."""
        x, y, z = (column.astype(np.float32)[:, None, None] for column in points.T)
        return self._outside_lung(x, y, z, self._cavity(x, y, z), self._diaphragm(x, y) - z)[:, 0, 0]

    def _diaphragm(self, x: Array, y: Array) -> Array:
        """Height of the diaphragm: a dome on each side, the right one higher."""
        dome = 1 - ((np.abs(x) - 0.5 * self.width) / (0.56 * self.width)) ** 2 - ((y + 12) / (1.1 * self.depth)) ** 2
        return np.asarray(self.floor + 13 / (1 + np.exp(x / 12)) + self.dome * dome, dtype=np.float32)

    def _lung(self) -> Array:
        """HU of the lungs: denser at the back, emptier with emphysema."""
        return np.asarray(LUNG - 70 * self.emphysema + 35 * self.y / self.depth, dtype=np.float32)

    def _mediastinum(self) -> None:
        h, a = self.heart, self.aorta
        self._ellipsoid((20 * h, -22, -46), (71 * h, 45 * h, 50 * h), BLOOD, tilt=-34)
        self._ellipsoid((-17 * h, -14, -42), (30 * h, 34 * h, 42 * h), BLOOD)
        self._tube((-14, -16, -14), (-15 * a, -10, 44), 15 * a, BLOOD)
        self._tube((-15 * a, -10, 44), (20 * a, 26, 56), 13 * a, BLOOD)
        self._tube((21 * a, 32, 54), (12 * a, self.depth - 42, -120), 12 * a, BLOOD)
        if self.old > 0.5:
            self._tube((25 * a, 24, 62), (31 * a, 32, 50), 3, 60 + 500 * (self.old - 0.5))
        self._tube((8, -22, 0), (29, 2, 26), 14, BLOOD)
        self._tube((-25, -6, 15), (-20, -8, 108), 9, BLOOD)
        self._tube((30, 6, 24), (48, 10, 14), 11, BLOOD)
        self._tube((-26, 6, 18), (-46, 10, 6), 11, BLOOD)
        self._tube((0, 4, 200), (1, 14, 46), 8.5, AIR)
        self._tube((1, 14, 46), (-30, 16, 22), 6.5, AIR)
        self._tube((1, 14, 46), (36, 18, 16), 6, AIR)

    def _abdomen(self) -> None:
        rng = self.rng
        gas = rng.random(3)
        if gas[0] < 0.8:
            center = (58 + 8 * gas[1], -18, self.floor + self.dome * 0.45 - 12)
            self._ellipsoid(center, (20 + 14 * gas[1], 24, 8 + 8 * gas[2]), AIR)
        if gas[1] < 0.35:
            self._ellipsoid((95, -30, self.floor - 28), (22, 18, 12 + 8 * gas[0]), AIR)

    def _skeleton(self, cavity: Array) -> None:
        self._ribs(cavity)
        self._spine()
        bone, front = self.bone, -(self.depth + 4)
        self._ellipsoid((0, front + 2, 30), (19, 6, 74), 220 * bone)
        for side in (-1.0, 1.0):
            reach = self.width + 14
            self._tube((side * 15, front + 28, 98), (side * 0.55 * reach, front + 40, 107), 6.5, 850 * bone)
            self._tube((side * 0.55 * reach, front + 40, 107), (side * 1.02 * reach, -8, 124), 6.5, 850 * bone)
            self._ellipsoid((side * 0.87 * reach, 0.78 * self.depth, 52), (23, 5, 62), 330 * bone, tilt=side * 14)
            self._ellipsoid((side * (reach + 36), 2, 98), (24, 24, 25), 380 * bone)

    def _ribs(self, cavity: Array) -> None:
        """All ribs at once: bands on the rib cage that fall from the spine to the front."""
        near = np.abs(cavity - 5) < 4.5 + self.edge / 2
        x, y, z = (np.broadcast_to(a, near.shape)[near] for a in (self.x, self.y, self.z))
        ahead = np.arccos(np.clip(y / np.hypot(y, x * self.depth / self.width), -1, 1)) / np.pi
        spacing = self.top / 5.6
        level = (self.top - 4 - z) / spacing - 3.7 * ahead**1.25
        number = np.clip(np.round(level), 0, 10)
        out = np.maximum(np.abs(cavity[near] - 5) - 4.5, np.abs(level - number) * spacing - 6)
        out = np.maximum(out, np.maximum((ahead - 0.84 + 0.012 * number) * 240, 12 - np.abs(x)))
        share = np.clip(0.5 - out / self.edge, 0, 1, dtype=np.float32)
        self.volume[near] += share * (np.float32(860 * self.bone) - self.volume[near])

    def _spine(self) -> None:
        middle = self.depth - 14
        box = self._box((0, middle, 0), (45, 70, 400))
        x, y, z = self._within(box)
        height = np.abs((z / 25.0 + 0.5) % 1 - 0.5) * 25.0
        column = (np.sqrt((x / 19) ** 2 + ((y - middle) / 16) ** 2) - 1) * 16
        self._paint(column, 90.0, box)
        self._paint(np.maximum(column, height - 10.2), 165 * self.bone + 20, box)
        self._paint(np.maximum(np.maximum(column, np.abs(height - 9) - 1.6), -column - 40), 330 * self.bone, box)
        ring = np.sqrt((x / 14) ** 2 + ((y - middle - 23) / 12) ** 2) * 12 - 12
        self._paint(ring, MUSCLE, box)
        self._paint(np.maximum(np.abs(ring + 1.5) - 2.5, height - 7), 300 * self.bone, box)
        wing = np.maximum(np.maximum(np.abs(x) - 30, np.abs(y - middle - 24) - 5), height - 5)
        thorn = np.maximum(np.maximum(np.abs(x) - 4, np.abs(y - middle - 44) - 11), height - 7)
        self._paint(np.minimum(np.maximum(wing, 13 - np.abs(x)), thorn), 300 * self.bone, box)

    def _breasts(self) -> None:
        size, front = self.breast, -(self.depth + 14 + 0.8 * self.fat)
        for side in (-1.0, 1.0):
            center = (side * 0.56 * self.width, front + 12, -34 - 10 * size)
            self._ellipsoid(center, (48 * size**0.5, 29 * size, 43 * size**0.5), -45.0, over=FAT)

    def _masses(self) -> None:
        rng = np.random.default_rng((self.patient.seed, 1))
        for _ in range(self.patient.lesions):
            radius = rng.uniform(15, 28)
            center = self._place(rng, radius)
            box = self._box(center, (2.2 * radius,) * 3)
            x, y, z = (a - c for a, c in zip(self._within(box), center, strict=True))
            distance = np.sqrt(x**2 + y**2 + z**2) + 1e-3
            lobes, phase = rng.normal(0, 0.22, 3), rng.uniform(0, 2 * np.pi, 3)
            surface = radius * (
                1 + lobes[0] * np.sin(2.2 * x / radius + phase[0]) + lobes[1] * np.sin(2.2 * z / radius + phase[1])
            )
            self._paint(distance - 1.5 * surface, -640.0, box, over=-700)
            self._paint(distance - surface, MASS, box)

    def _effusion(self, outside: Array) -> None:
        """Fluid in the lower pleural space of one side, in two of three patients with masses; it climbs the wall."""
        rng = np.random.default_rng((self.patient.seed, 3))
        side, depth = rng.choice((-1, 1)), rng.uniform(-60, 120)
        if depth > 0:
            level = self.floor + self.dome * 0.3 + depth * (0.35 + 0.65 * np.clip(np.abs(self.x) / self.width, 0, 1) ** 3)
            self._paint(np.maximum(np.maximum(outside, self.z - level), -side * self.x), FLUID)

    def _place(self, rng: np.random.Generator, radius: float) -> Point:
        """The centre of a mass: in a lung and, seen from the front, clear of spine, heart and diaphragm."""
        points = rng.uniform(-1, 1, (400, 3)) * (0.9 * self.width, 0.8 * self.depth, 60) + (0, 0, 45)
        outside = self._outside_lung_at(points) + 0.8 * radius
        hidden = 42 + 45 * self.heart * ((points[:, 0] > 0) & (points[:, 2] < 10)) - np.abs(points[:, 0])
        reach = np.maximum(outside, hidden)
        x, y, z = points[int(np.argmax(reach < 0)) if (reach < 0).any() else int(reach.argmin())].tolist()
        return x, y, z

    def _vessels(self) -> None:
        """The lungs' vessels: trees that branch seven times from each hilum, laid down as thin tubes of blood."""
        rng = np.random.default_rng((self.patient.seed, 2))
        start = np.repeat([[-36.0, 10.0, 14.0], [38.0, 12.0, 18.0]], 7, axis=0)
        way = rng.normal(0, 0.75, start.shape) + np.sign(start[:, :1]) * [0.85, 0.0, 0.0]
        points, weights = [], []
        pieces = int(np.clip(32 / self.edge, 4, 16))
        along = (np.arange(pieces) + 0.5) / pieces
        for generation in range(7):
            way = way / np.linalg.norm(way, axis=1, keepdims=True)
            length = 27 * 0.86**generation * rng.uniform(0.7, 1.3, (len(start), 1))
            points.append((start[:, None] + along[:, None] * (length * way)[:, None]).reshape(-1, 3))
            weights.append(np.repeat(length[:, 0] / pieces * np.pi * (4.2 * 0.78**generation) ** 2, pieces))
            start = np.repeat(start + length * way, 2, axis=0)
            way = np.repeat(way, 2, axis=0) + rng.normal(0, 0.42, start.shape)
        self._splat(np.concatenate(points), np.concatenate(weights) * (BLOOD - LUNG))

    def _splat(self, points: NDArray[np.float64], mass: NDArray[np.float64]) -> None:
        """Add HU x cubic millimetres at points in the lungs, shared among the eight voxels around each."""
        inside = self._outside_lung_at(points) < -1
        points, mass = points[inside], mass[inside]
        points[:, 1] += self._bend(points[:, 2].astype(np.float32))
        low, part = [], []
        for axis, values in zip(self.axes, (points[:, 2], points[:, 1], points[:, 0]), strict=True):
            place = np.clip((values - axis[0]) / (axis[1] - axis[0]), 0, len(axis) - 1.001)
            low.append(place.astype(np.intp))
            part.append((1 - place + low[-1], place - low[-1]))
        _, height, width = self.volume.shape
        first = (low[0] * height + low[1]) * width + low[2]
        mass = mass / float(np.prod([axis[1] - axis[0] for axis in self.axes]))
        corners = list(np.ndindex(2, 2, 2))
        at = np.concatenate([first + (dz * height + dy) * width + dx for dz, dy, dx in corners])
        shares = np.concatenate([mass * part[0][dz] * part[1][dy] * part[2][dx] for dz, dy, dx in corners])
        total = np.bincount(at, weights=shares, minlength=self.volume.size).reshape(self.volume.shape).astype(np.float32)
        self.volume += np.minimum(total, np.maximum(BLOOD - self.volume, 0))

    def _ellipsoid(self, center: Point, radii: Point, hu: float, *, tilt: float = 0.0, over: float | None = None) -> None:
        """Paint an ellipsoid, turned by ``tilt`` degrees in the frontal plane."""
        reach = max(radii[0], radii[2])
        box = self._box(center, (reach, radii[1], reach) if tilt else radii)
        x, y, z = (a - c for a, c in zip(self._within(box), center, strict=True))
        cos, sin = np.cos(np.deg2rad(tilt)), np.sin(np.deg2rad(tilt))
        along, across = x * cos + z * sin, z * cos - x * sin
        norm = np.sqrt((along / radii[0]) ** 2 + (y / radii[1]) ** 2 + (across / radii[2]) ** 2)
        self._paint((norm - 1) * min(radii), hu, box, over=over)

    def _tube(self, start: Point, end: Point, radius: float, hu: float) -> None:
        """Paint a tube with round ends."""
        a, b = np.array(start), np.array(end)
        box = self._box(tuple((a + b) / 2), tuple(np.abs(b - a) / 2 + radius))
        x, y, z = self._within(box)
        way, length = b - a, float(((b - a) ** 2).sum())
        along = np.clip(((x - a[0]) * way[0] + (y - a[1]) * way[1] + (z - a[2]) * way[2]) / length, 0, 1)
        squares = (x - a[0] - along * way[0]) ** 2 + (y - a[1] - along * way[1]) ** 2 + (z - a[2] - along * way[2]) ** 2
        self._paint(np.sqrt(squares) - radius, hu, box)

    def _box(self, center: Point, reach: Point) -> Box:
        """The voxels within ``reach`` of ``center`` on each axis, with room for soft edges and the back's curve."""
        found = []
        ends = center[2] - reach[2], center[2] + reach[2]
        bend = self._bend(np.array([*ends, np.clip(0, *ends)], dtype=np.float32))
        for axis, middle, wide in zip(self.axes, center[::-1], reach[::-1], strict=True):
            low, high = middle - wide - self.edge, middle + wide + self.edge
            if axis is self.axes[1]:
                low, high = low + float(bend.min()), high + float(bend.max())
            first, last = np.searchsorted(axis, (low, high))
            found.append(slice(int(first), int(last)))
        return found[0], found[1], found[2]

    def _within(self, box: Box) -> tuple[Array, Array, Array]:
        return self.x[:, :, box[2]], self.y[box[0], box[1]], self.z[box[0]]

    def _paint(self, outside: Array, hu: float | Array, box: Box | None = None, *, over: float | None = None) -> None:
        """Put ``hu`` where ``outside`` (mm to the surface) is negative; with ``over`` only onto tissue of at most that HU."""
        part = self.volume if box is None else self.volume[box]
        share = outside * np.float32(-1 / self.edge)
        share += np.float32(0.5)
        np.clip(share, 0, 1, out=share)
        if over is not None:
            share = share * (part <= over + 1)
        part += share * (hu - part)


def _profile(heights: Array, at: Sequence[float], values: Sequence[float]) -> Array:
    """A size that changes along the body, by linear interpolation between heights."""
    return np.interp(heights, at, values).astype(np.float32)
