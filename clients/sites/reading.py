"""Any medical image to the array a model takes: decoded, windowed to [0, 1], framed and resampled."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn import functional

from flpriv.clients.sites.decoding import Array, Raw, decode
from flpriv.errors import DataError

LUNG_WINDOW = (-1000.0, 400.0)
"""HU shown black and white where neither the source nor the file names a window."""

Fit = Literal["stretch", "crop", "pad"]


def read_image(
    path: Path,
    *,
    shape: tuple[int, ...],
    window: tuple[float, float] | None = None,
    modality: str = "xray",
    fit: Fit = "stretch",
) -> Array:
    """One image file, or a folder with a DICOM series, as float32 of ``shape`` in [0, 1].

    Args:
        path: PNG, JPEG, TIFF, DICOM, NIfTI, npy or npz by suffix; a folder is a DICOM series.
        shape: ``(C, H, W)`` or ``(C, D, H, W)``, C being 1 or 3.
        window: values shown black and white, in the file's own units (HU for CT). Without one the file's own window or range
            of bits counts; where it has neither, the lung window for CT and the 0.5th to 99.5th percentile for others.
        modality: ``"ct"`` takes NIfTI and plain arrays as HU.
        fit: how another aspect ratio (in mm where known) becomes ``shape``: ``"stretch"`` all of it, ``"crop"`` the middle,
            or ``"pad"`` with black.

    Raises:
        DataError: naming the file, if it is missing, damaged, has no pixels, or other dimensions than ``shape``.
    """
    raw = decode(path)
    dimensions = len(shape) - 1
    found = raw.values.ndim - raw.color
    if found != dimensions:
        other = f"volume of {'x'.join(map(str, raw.values.shape))}" if found == 3 else "single 2D image"
        raise DataError(f"{path}: a {other}, where {dimensions}D images are expected; set dimensions = {found}")
    return to_shape(windowed(raw, window=window, modality=modality), shape=shape, spacing=raw.spacing, fit=fit)


def windowed(raw: Raw, *, window: tuple[float, float] | None, modality: str) -> Array:
    """The values of ``raw`` in [0, 1], channels first, ``(C, H, W)`` or ``(C, D, H, W)``, bone bright whatever the polarity."""
    low, high = window or raw.shown or _default(raw, modality)
    image = np.clip((raw.values - low) / max(high - low, 1e-6), 0, 1).astype(np.float32)
    if raw.inverted:
        image = 1 - image
    return np.moveaxis(image, -1, 0) if raw.color else image[None]


def _default(raw: Raw, modality: str) -> tuple[float, float]:
    if raw.hounsfield or modality == "ct":
        return LUNG_WINDOW
    low, high = np.percentile(raw.values, (0.5, 99.5))
    return float(low), float(high)


def to_shape(image: Array, *, shape: tuple[int, ...], spacing: Sequence[float] = (), fit: Fit = "stretch") -> Array:
    """Channels-first ``image`` as ``shape``: framed by ``fit``, resampled, RGB and gray turned into each other."""
    framed = _framed(image, spacing or (1.0,) * (image.ndim - 1), shape[1:], fit)
    if framed.shape[0] == 3 and shape[0] == 1:
        framed = np.tensordot(np.array([0.299, 0.587, 0.114], dtype=np.float32), framed, axes=1)[None]
    resized = resize(framed, shape[1:])
    return np.ascontiguousarray(np.broadcast_to(resized, shape) if resized.shape[0] == 1 else resized)


def resize(image: Array, spatial: Sequence[int]) -> Array:
    """``(C, H, W)`` or ``(C, D, H, W)`` to another spatial size by linear interpolation, antialiased where it shrinks."""
    if image.shape[1:] == tuple(spatial):
        return image
    tensor = torch.from_numpy(np.ascontiguousarray(image))
    if tensor.ndim == 4:
        channels, depth = tensor.shape[:2]
        planes = _interpolate(tensor, spatial[1:])
        tensor = _interpolate(planes.reshape(1, channels, depth, -1), (spatial[0], planes.shape[2] * planes.shape[3]))
        tensor = tensor.reshape(channels, *spatial)
    else:
        tensor = _interpolate(tensor[None], spatial)[0]
    return np.asarray(tensor.clamp(0, 1).numpy(), dtype=np.float32)


def _interpolate(tensor: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    return functional.interpolate(tensor, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)


def _framed(image: Array, spacing: Sequence[float], spatial: Sequence[int], fit: Fit) -> Array:
    """The middle of ``image``, or the image within black, so that its millimetres have the aspect ratio of ``spatial``."""
    if fit == "stretch":
        return image
    pace = [n * mm / wanted for n, mm, wanted in zip(image.shape[1:], spacing, spatial, strict=True)]
    scale = min(pace) if fit == "crop" else max(pace)
    for axis, (n, mm, wanted) in enumerate(zip(image.shape[1:], spacing, spatial, strict=True), start=1):
        keep = max(1, round(scale * wanted / mm))
        if keep < n:
            image = image.take(range((n - keep) // 2, (n - keep) // 2 + keep), axis=axis)
        elif keep > n:
            before = (keep - n) // 2
            image = np.pad(image, [(before, keep - n - before) if a == axis else (0, 0) for a in range(image.ndim)])
    return image
