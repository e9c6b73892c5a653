"""One image file or DICOM series to an array of its own values: PNG, JPEG, DICOM, NIfTI, npy and npz."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flpriv.errors import DataError, near

if TYPE_CHECKING:
    from pydicom import Dataset

Array = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Raw:
    """An image as its file holds it.

    Args:
        values: ``(H, W)``, ``(H, W, 3)`` where ``color``, or ``(D, H, W)``; HU for CT. A volume's axes run to the patient's head
            (D), back (H) and left (W), so that its slices look as radiologists view them.
        shown: the values the file itself wants shown black and white; ``None`` where it does not say.
        spacing: millimetres between elements, one per axis of the image.
        color: the last axis is RGB.
        inverted: black and white change places after windowing (DICOM MONOCHROME1).
        hounsfield: ``values`` are HU.
    """

    values: Array
    shown: tuple[float, float] | None
    spacing: tuple[float, ...]
    color: bool = False
    inverted: bool = False
    hounsfield: bool = False


def decode(path: Path) -> Raw:
    """Read ``path`` by its suffix; a folder is a DICOM series, and a file without a known suffix is tried as DICOM.

    Raises:
        DataError: naming the file, if it is missing, damaged, of an unknown kind or holds no image.
    """
    if path.is_dir():
        return _series(path)
    if not path.is_file():
        raise DataError(f"{path}: no such image file")
    name = path.name.lower()
    reader = next((read for suffix, read in _READERS.items() if name.endswith(suffix)), None)
    if reader is None and not _is_dicom(path):
        raise DataError(f"{path}: unknown kind of image{near(path.suffix, _READERS)}")
    try:
        return (reader or _dicom)(path)
    except DataError:
        raise
    except Exception as error:  # decoders raise whatever their authors chose
        raise DataError(f"{path}: cannot be read as an image: {_first_line(error)}") from error


def _picture(path: Path) -> Raw:
    from PIL import Image

    with Image.open(path) as opened:
        colored = opened.mode not in ("1", "L", "I", "I;16", "I;16B", "I;16L", "F")
        values = np.asarray(opened.convert("RGB") if colored else opened, dtype=np.float32)
        white = 255.0 if colored else {"1": 1.0, "L": 255.0}.get(opened.mode, 65535.0)
        if opened.mode == "F":
            return _plain(values)
    color = values.ndim == 3
    if color and (values == values[..., :1]).all():
        values, color = values[..., 0], False
    return Raw(values=values, shown=(0.0, white), spacing=(1.0, 1.0), color=color)


def _array(path: Path) -> Raw:
    loaded = np.load(path)
    if isinstance(loaded, np.ndarray):
        return _plain(loaded)
    with loaded:
        key = "image" if "image" in loaded.files else loaded.files[0] if len(loaded.files) == 1 else ""
        if not key:
            raise ValueError(f"needs one array, or one called 'image'; it holds {', '.join(loaded.files) or 'none'}")
        return _plain(loaded[key])


def _plain(values: NDArray[Any]) -> Raw:
    """An array without further facts: only 8-bit integers say what is black and white."""
    if values.ndim not in (2, 3) or not np.issubdtype(values.dtype, np.number) or not values.size:
        raise ValueError(f"holds an array of shape {values.shape} and type {values.dtype}, not an image")
    shown = (0.0, 255.0) if values.dtype == np.uint8 else None
    return Raw(values=values.astype(np.float32), shown=shown, spacing=(1.0,) * values.ndim)


def _nifti(path: Path) -> Raw:
    from nibabel.loadsave import load
    from nibabel.spatialimages import SpatialImage

    image = load(path)
    if not isinstance(image, SpatialImage):
        raise ValueError("holds no volume")
    values = np.asarray(image.dataobj, dtype=np.float32)
    while values.ndim > 3 and values.shape[-1] == 1:
        values = values[..., 0]
    if values.ndim == 2:
        values = values[..., None]
    if values.ndim != 3:
        raise ValueError(f"has shape {values.shape}, not one volume")
    canonical, spacing = _canonical(values, np.asarray(image.affine, dtype=np.float64))
    if canonical.shape[0] == 1:
        canonical, spacing = canonical[0], spacing[1:]
    return Raw(values=canonical, shown=None, spacing=spacing)


def _canonical(values: Array, affine: NDArray[np.float64]) -> tuple[Array, tuple[float, ...]]:
    """A volume with an affine to right-anterior-superior millimetres, turned to (head, back, left), and its spacing."""
    import nibabel

    ways: Any = nibabel.orientations
    start = ways.io_orientation(affine)
    turned = ways.apply_orientation(values, ways.ornt_transform(start, ways.axcodes2ornt(("L", "P", "S"))))
    size = np.sqrt((affine[:3, :3] ** 2).sum(axis=0))
    spacing = tuple(float(size[int(np.flatnonzero(start[:, 0] == axis)[0])]) for axis in (2, 1, 0))
    return np.ascontiguousarray(turned.transpose(2, 1, 0), dtype=np.float32), spacing


def _is_dicom(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"


def _dicom(path: Path) -> Raw:
    dataset = _dataset(path)
    shown, values = _shown(dataset, _rescaled(dataset))
    color = values.ndim > 2 and values.shape[-1] == 3 and dataset.get("SamplesPerPixel", 1) == 3
    plane = tuple(float(v) for v in dataset.get("PixelSpacing", None) or dataset.get("ImagerPixelSpacing", None) or (1, 1))
    depth = float(dataset.get("SpacingBetweenSlices", None) or dataset.get("SliceThickness", None) or 1)
    return Raw(
        values=values,
        shown=shown,
        spacing=plane if values.ndim == 2 or color else (depth, *plane),
        color=color,
        inverted=dataset.get("PhotometricInterpretation", "") == "MONOCHROME1",
        hounsfield=_is_ct(dataset),
    )


def _dataset(path: Path) -> Dataset:
    from pydicom import dcmread
    from pydicom.errors import InvalidDicomError

    try:
        dataset = dcmread(path)
    except InvalidDicomError as error:
        raise DataError(f"{path}: not a DICOM file") from error
    if not any(key in dataset for key in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
        raise DataError(f"{path}: the DICOM file has no pixels ({dataset.get('Modality', None) or 'no modality'})")
    return dataset


def _rescaled(dataset: Dataset) -> Array:
    """Pixels after the modality's rescaling, the padding around a field of view set to its darkest value."""
    from pydicom.pixels.processing import apply_modality_lut

    stored = dataset.pixel_array
    padding = dataset.get("PixelPaddingValue", None)
    if padding is not None and stored.dtype.kind in "iu" and stored.ndim < 4:
        outside = stored == np.asarray(int(padding) & 0xFFFF, dtype=np.uint16).astype(stored.dtype)
        if outside.any() and not outside.all():
            bright_is_low = dataset.get("PhotometricInterpretation", "") == "MONOCHROME1"
            inside = stored[~outside]
            stored = np.where(outside, inside.max() if bright_is_low else inside.min(), stored)
    return np.asarray(apply_modality_lut(stored, dataset), dtype=np.float32)


def _shown(dataset: Dataset, values: Array) -> tuple[tuple[float, float] | None, Array]:
    """What the file wants shown: its first window, else its lookup table, else all its bits; ``None`` for CT without a window."""
    center, width = (_first(dataset.get(key, None)) for key in ("WindowCenter", "WindowWidth"))
    if center is not None and width is not None and width > 1:
        return (center - width / 2, center + width / 2 - 1), values
    if "VOILUTSequence" in dataset:
        from pydicom.pixels.processing import apply_voi_lut

        bits = int(dataset.VOILUTSequence[0].LUTDescriptor[2])
        return (0.0, 2.0**bits - 1), np.asarray(apply_voi_lut(values.astype(np.int32), dataset), dtype=np.float32)
    bits = int(dataset.get("BitsStored", 0) or 0)
    if _is_ct(dataset) or not bits:
        return None, values
    signed = int(dataset.get("PixelRepresentation", 0) or 0)
    ends = np.array([-(2.0 ** (bits - 1)), 2.0 ** (bits - 1) - 1] if signed else [0.0, 2.0**bits - 1])
    ends = ends * float(dataset.get("RescaleSlope", None) or 1) + float(dataset.get("RescaleIntercept", None) or 0)
    return (float(ends.min()), float(ends.max())), values


def _first(value: Any) -> float | None:
    if value is None or value == "":
        return None
    return float(value[0]) if isinstance(value, Sequence) and not isinstance(value, str) else float(value)


def _is_ct(dataset: Dataset) -> bool:
    return dataset.get("Modality", "") == "CT" and "RescaleIntercept" in dataset


def _series(folder: Path) -> Raw:
    """A folder of DICOM slices as one volume, sorted by their positions."""
    files = [file for file in sorted(folder.iterdir()) if file.is_file() and (file.suffix.lower() == ".dcm" or _is_dicom(file))]
    if not files:
        raise DataError(f"{folder}: an empty series: no DICOM file in the folder")
    try:
        return _volume(folder, [(file, _dataset(file)) for file in files])
    except DataError:
        raise
    except Exception as error:
        raise DataError(f"{folder}: the series cannot be read: {_first_line(error)}") from error


def _volume(folder: Path, slices: Sequence[tuple[Path, Dataset]]) -> Raw:
    orientation = _one_series(folder, slices)
    normal = np.cross(orientation[:3], orientation[3:])
    heights = [float(np.dot(normal, _numbers(file, d, "ImagePositionPatient", 3))) for file, d in slices]
    order = sorted(range(len(slices)), key=heights.__getitem__)
    first_file, first = slices[order[0]]
    step = _step(folder, [(heights[at], slices[at][0]) for at in order], first)
    values = np.stack([_rescaled(slices[at][1]) for at in order])
    rows, columns = _numbers(first_file, first, "PixelSpacing", 2)
    affine = np.eye(4)
    affine[:3, 0], affine[:3, 1], affine[:3, 2] = orientation[:3] * columns, orientation[3:] * rows, normal * step
    canonical, spacing = _canonical(values.transpose(2, 1, 0), np.diag([-1.0, -1.0, 1.0, 1.0]) @ affine)
    return Raw(
        values=canonical,
        shown=_shown(first, values[0])[0],
        spacing=spacing,
        inverted=first.get("PhotometricInterpretation", "") == "MONOCHROME1",
        hounsfield=_is_ct(first),
    )


def _one_series(folder: Path, slices: Sequence[tuple[Path, Dataset]]) -> NDArray[np.float64]:
    """The direction cosines that all slices share.

    Raises:
        DataError: if the folder mixes series, directions or sizes.
    """
    series = {str(d.get("SeriesInstanceUID", "")) for _, d in slices}
    if len(series) > 1:
        raise DataError(f"{folder}: holds {len(series)} DICOM series; give each series a folder of its own")
    first = slices[0]
    orientation = _numbers(*first, "ImageOrientationPatient", 6)
    for file, dataset in slices:
        if (dataset.Rows, dataset.Columns) != (first[1].Rows, first[1].Columns):
            raise DataError(
                f"{file}: {dataset.Rows}x{dataset.Columns} pixels, other slices have {first[1].Rows}x{first[1].Columns}"
            )
        if np.abs(_numbers(file, dataset, "ImageOrientationPatient", 6) - orientation).max() > 1e-3:
            raise DataError(f"{file}: lies in another plane than the other slices; take scout images out of the folder")
    return orientation


def _step(folder: Path, placed: Sequence[tuple[float, Path]], first: Dataset) -> float:
    """Millimetres from slice to slice.

    Raises:
        DataError: if two slices share a place, or one is missing.
    """
    if len(placed) == 1:
        return float(first.get("SliceThickness", None) or 1)
    gaps = np.diff([at for at, _ in placed])
    step = float(np.median(gaps))
    if gaps.min() < 0.01:
        raise DataError(f"{placed[int(gaps.argmin()) + 1][1]}: a second slice at the same position; keep one of them")
    if gaps.max() > 1.5 * step:
        after = placed[int(gaps.argmax())]
        raise DataError(f"{folder}: a slice is missing after {after[1].name}: {gaps.max():.1f} mm apart, others {step:.1f} mm")
    return step


def _numbers(file: Path, dataset: Dataset, key: str, count: int) -> NDArray[np.float64]:
    value = dataset.get(key, None)
    if value is None or len(value) != count:
        raise DataError(f"{file}: {key} is missing, so its place in the series is unknown")
    return np.array([float(v) for v in value])


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


_READERS: Mapping[str, Callable[[Path], Raw]] = {
    ".png": _picture,
    ".jpg": _picture,
    ".jpeg": _picture,
    ".tif": _picture,
    ".tiff": _picture,
    ".bmp": _picture,
    ".dcm": _dicom,
    ".dicom": _dicom,
    ".nii": _nifti,
    ".nii.gz": _nifti,
    ".npy": _array,
    ".npz": _array,
}
SUFFIXES: tuple[str, ...] = tuple(_READERS)
"""Endings of the file names :func:`decode` knows."""
