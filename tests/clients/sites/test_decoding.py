"""Files of every kind, real and made here, to arrays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import FileDataset, FileMetaDataset
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, generate_uid

from flpriv.clients.sites.decoding import decode
from flpriv.clients.sites.reading import read_image
from flpriv.errors import DataError

nifti: Any = nibabel  # has no types
SERIES = "ct_3d/dicom_series/Lung_Dx-A0002_axial"


def dicom(path: Path, pixels: np.ndarray | None, **facts: Any) -> Path:
    """A small DICOM file with the given pixels and further attributes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID, meta.MediaStorageSOPInstanceUID = CTImageStorage, generate_uid()
    dataset = FileDataset(str(path), {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.Modality, dataset.PhotometricInterpretation = "CR", "MONOCHROME2"
    if pixels is not None:
        dataset.Rows, dataset.Columns = pixels.shape
        dataset.SamplesPerPixel, dataset.BitsAllocated, dataset.BitsStored, dataset.HighBit = 1, 16, 12, 11
        dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
        dataset.PixelData = pixels.tobytes()
    for key, value in facts.items():
        setattr(dataset, key, value)
    dataset.save_as(path, enforce_file_format=True)
    return path


def series(folder: Path, heights: list[float], **facts: Any) -> Path:
    """An axial CT series with one slice of constant value per height, named in another order than it lies."""
    folder.mkdir()
    uid = generate_uid()
    for number, height in enumerate(heights):
        dicom(
            folder / f"{number}.dcm",
            np.full((6, 8), 100 + round(height), dtype=np.int16),
            **{
                "Modality": "CT",
                "SeriesInstanceUID": uid,
                "ImageOrientationPatient": [1, 0, 0, 0, 1, 0],
                "ImagePositionPatient": [0, 0, height],
                "PixelSpacing": [0.5, 0.7],
                "RescaleSlope": 2,
                "RescaleIntercept": -1000,
                **facts,
            },
        )
    return folder


def test_every_real_dicom_file_decodes(test_data: Path) -> None:
    files = sorted((test_data / "dicom").glob("*.dcm"))
    assert len(files) == 23
    for file in files:
        image = read_image(file, shape=(1, 32, 32))
        assert image.shape == (1, 32, 32) and image.dtype == np.float32, file.name
        assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.05, file.name


def test_compressed_syntaxes_hold_the_same_slice(test_data: Path) -> None:
    def slice_of(kind: str) -> np.ndarray:
        file = test_data / "dicom" / f"ct_chest_wg04_ct1_{kind}.dcm"
        return read_image(file, shape=(1, 512, 512), window=(-1000, 400))

    reference = slice_of("rle")
    for kind in ("j2k_lossless", "jpegls_lossless", "jpeg_lossless_sv1"):
        assert np.array_equal(slice_of(kind), reference), kind
    for kind, tolerance in (("jpegls_near", 0.003), ("j2k_lossy", 0.02)):
        difference = np.abs(slice_of(kind) - reference)
        assert 0 < difference.mean() < tolerance, kind


def test_monochrome1_is_turned_to_bright_bone(test_data: Path) -> None:
    upright = read_image(test_data / "dicom/dx_chest_nih_p1_cardiomegaly.dcm", shape=(1, 48, 48))
    for name in ("cr_chest_mono1_10bit_explicit", "cr_chest_mono1_15bit_j2k"):
        image = read_image(test_data / f"dicom/{name}.dcm", shape=(1, 48, 48))
        spine, lungs = image[0, 12:40, 22:26].mean(), np.r_[image[0, 14:26, 10:16], image[0, 14:26, 32:38]].mean()
        assert spine > lungs + 0.1, name
        assert np.corrcoef(image.ravel(), upright.ravel())[0, 1] > 0.3, name


def test_real_series_and_its_converted_volume_agree(test_data: Path) -> None:
    """The NIfTI volume holds the same patient's series; the folder has twenty of its slices."""
    part = decode(test_data / SERIES)
    assert part.values.shape == (20, 512, 512) and part.hounsfield
    assert part.spacing == pytest.approx((8.0, 0.646484375, 0.646484375))
    whole = decode(test_data / "ct_3d/volumes/lungdx_A0002.nii.gz")
    small = part.values.reshape(20, 128, 4, 128, 4).mean(axis=(2, 4))
    scores = [np.corrcoef(small.ravel(), whole.values[at : at + 20].ravel())[0, 1] for at in range(11)]
    assert max(scores) > 0.97
    mirrored = small[:, :, ::-1]
    assert max(np.corrcoef(mirrored.ravel(), whole.values[at : at + 20].ravel())[0, 1] for at in range(11)) < 0.95


def test_real_volumes_are_read_as_hounsfield_units(test_data: Path) -> None:
    for file in sorted((test_data / "ct_3d/volumes").glob("*.nii.gz")):
        image = read_image(file, shape=(1, 16, 24, 24), modality="ct")
        assert image.shape == (1, 16, 24, 24)
        assert image[0, :, 0].mean() < 0.1 < image[0, :, 8:16, 8:16].mean(), file.name


def test_rescaling_window_and_polarity(tmp_path: Path) -> None:
    stored = np.array([[0, 100], [200, 4095]], dtype=np.uint16)
    facts = {"RescaleSlope": 2, "RescaleIntercept": -100, "WindowCenter": 100, "WindowWidth": 201}
    bright = read_image(dicom(tmp_path / "a.dcm", stored, **facts), shape=(1, 2, 2))
    assert np.allclose(bright[0], np.array([[0, 0.5], [1, 1]]), atol=0.005)
    dark = dicom(tmp_path / "b.dcm", stored, PhotometricInterpretation="MONOCHROME1", **facts)
    assert np.allclose(read_image(dark, shape=(1, 2, 2)), 1 - bright, atol=1e-6)
    asked = read_image(dark, shape=(1, 2, 2), window=(-100, 300))
    assert np.allclose(asked[0], np.array([[1, 0.5], [0, 0]]), atol=1e-6)
    bits = read_image(dicom(tmp_path / "c.dcm", stored), shape=(1, 2, 2))
    assert np.allclose(bits[0], stored / 4095, atol=1e-6)


@pytest.mark.parametrize("polarity", ["MONOCHROME1", "MONOCHROME2"])
def test_padding_is_black_in_either_polarity(tmp_path: Path, polarity: str) -> None:
    stored = np.array([[2000, 500], [1000, 1500]], dtype=np.uint16)
    file = dicom(
        tmp_path / "a.dcm",
        stored,
        PixelPaddingValue=2000,
        PhotometricInterpretation=polarity,
        WindowCenter=1000,
        WindowWidth=1000,
    )
    image = read_image(file, shape=(1, 2, 2))
    assert image[0, 0, 0] == image.min()


def test_series_is_sorted_by_position_and_turned(tmp_path: Path) -> None:
    raw = decode(series(tmp_path / "s", [30, 10, 20, 0]))
    assert raw.values.shape == (4, 6, 8)
    assert raw.values[:, 0, 0].tolist() == [-800, -780, -760, -740]
    assert raw.spacing == pytest.approx((10, 0.5, 0.7))
    upside_down = decode(series(tmp_path / "t", [0, 10], ImageOrientationPatient=[1, 0, 0, 0, -1, 0]))
    assert upside_down.values[:, 0, 0].tolist() == [-800, -780]


def test_a_series_that_is_not_one_volume_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty: an empty series"):
        decode(tmp_path / "empty")
    with pytest.raises(DataError, match=r"slice is missing after 1.dcm: 30.0 mm apart"):
        decode(series(tmp_path / "gap", [0, 10, 40, 50]))
    with pytest.raises(DataError, match="second slice at the same position"):
        decode(series(tmp_path / "twice", [0, 10, 10, 20]))
    mixed = series(tmp_path / "mixed", [0, 10])
    series(tmp_path / "other", [20])
    (tmp_path / "other/0.dcm").rename(mixed / "9.dcm")
    with pytest.raises(DataError, match="holds 2 DICOM series"):
        decode(mixed)
    lost = series(tmp_path / "lost", [0, 10], ImagePositionPatient=None)
    with pytest.raises(DataError, match=r"0\.dcm: ImagePositionPatient is missing"):
        decode(lost)


def test_nifti_orientation_does_not_matter(tmp_path: Path) -> None:
    values = np.random.default_rng(0).normal(size=(5, 6, 7)).astype(np.float32)
    image = nifti.Nifti1Image(values, np.diag([1.0, 2.0, 3.0, 1.0]))
    nifti.save(image, tmp_path / "ras.nii.gz")
    first = decode(tmp_path / "ras.nii.gz")
    assert first.values.shape == (7, 6, 5) and first.spacing == pytest.approx((3, 2, 1))
    assert np.array_equal(first.values, values[::-1, ::-1].transpose(2, 1, 0))
    for axes in ("LPS", "SAR", "ALI"):
        turn = nifti.orientations.ornt_transform(nifti.orientations.axcodes2ornt("RAS"), nifti.orientations.axcodes2ornt(axes))
        nifti.save(image.as_reoriented(turn), tmp_path / f"{axes}.nii")
        again = decode(tmp_path / f"{axes}.nii")
        assert np.array_equal(again.values, first.values) and again.spacing == pytest.approx(first.spacing), axes


def test_pictures_of_8_and_16_bit_gray_and_color(tmp_path: Path) -> None:
    ramp = np.linspace(0, 1, 16).reshape(4, 4)
    Image.fromarray((ramp * 255).astype(np.uint8)).save(tmp_path / "8.png")
    Image.fromarray((ramp * 65535).astype(np.uint16)).save(tmp_path / "16.png")
    Image.fromarray(np.stack([(ramp * 255).astype(np.uint8)] * 3, axis=-1)).save(tmp_path / "gray.png")
    for name in ("8", "16", "gray"):
        assert np.allclose(read_image(tmp_path / f"{name}.png", shape=(1, 4, 4))[0], ramp, atol=0.003), name
    assert read_image(tmp_path / "8.png", shape=(3, 4, 4)).shape == (3, 4, 4)
    red = np.zeros((4, 4, 3), dtype=np.uint8)
    red[..., 0] = 255
    Image.fromarray(red).save(tmp_path / "red.png")
    assert read_image(tmp_path / "red.png", shape=(3, 4, 4))[:, 0, 0].tolist() == [1, 0, 0]
    assert np.allclose(read_image(tmp_path / "red.png", shape=(1, 4, 4)), 0.299)


def test_arrays_are_read_and_pickles_refused(tmp_path: Path) -> None:
    volume = np.arange(8, dtype=np.uint8).reshape(2, 2, 2)
    np.save(tmp_path / "a.npy", volume)
    np.savez(tmp_path / "a.npz", image=volume, mask=volume)
    for name in ("a.npy", "a.npz"):
        assert np.allclose(read_image(tmp_path / name, shape=(1, 2, 2, 2))[0], volume / 255)
    np.save(tmp_path / "b.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"b\.npy: cannot be read"):
        decode(tmp_path / "b.npy")


def test_damaged_files_are_named(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 4096, (40, 50), dtype=np.uint16)
    Image.fromarray(noise.astype(np.uint8)).save(tmp_path / "short.png")
    nifti.save(nifti.Nifti1Image(np.dstack([noise] * 3).astype(np.int16), np.eye(4)), tmp_path / "short.nii.gz")
    dicom(tmp_path / "short.dcm", noise)
    for file in list(tmp_path.iterdir()):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for name in ("text.png", "text.dcm", "text.nii", "text.nii.gz", "text.npz", "text.npy"):
        (tmp_path / name).write_text("no image")
    (tmp_path / "empty.jpeg").write_bytes(b"")
    files = sorted(tmp_path.iterdir())
    assert len(files) == 10
    for file in files:
        with pytest.raises(DataError, match=file.name) as caught:
            decode(file)
        assert "\n" not in str(caught.value), file.name


@pytest.mark.filterwarnings("ignore:End of file reached")
def test_a_damaged_real_file_is_named(tmp_path: Path, test_data: Path) -> None:
    compressed = (test_data / "dicom/ct_chest_wg04_ct1_j2k_lossless.dcm").read_bytes()
    (tmp_path / "short.dcm").write_bytes(compressed[: len(compressed) // 3])
    whole = next((test_data / "xray_multisite/images/nih_cc").glob("*.png")).read_bytes()
    (tmp_path / "flipped.png").write_bytes(whole[:200] + bytes(255 - b for b in whole[200:400]) + whole[400:])
    for file in tmp_path.iterdir():
        with pytest.raises(DataError, match=file.name):
            decode(file)


def test_dicom_without_pixels_is_named(tmp_path: Path) -> None:
    file = dicom(tmp_path / "report.dcm", None, Modality="SR")
    with pytest.raises(DataError, match=r"report\.dcm: the DICOM file has no pixels \(SR\)"):
        read_image(file, shape=(1, 8, 8))


def test_other_wrong_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png: no such image"):
        decode(tmp_path / "gone.png")
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(DataError, match=r"notes\.txt: unknown kind of image"):
        decode(tmp_path / "notes.txt")
    nifti.save(nifti.Nifti1Image(np.zeros((5, 6, 7), dtype=np.float32), np.eye(4)), tmp_path / "a.nii")
    with pytest.raises(DataError, match=r"a\.nii: a volume of 7x6x5, where 2D images are expected; set dimensions = 3"):
        read_image(tmp_path / "a.nii", shape=(1, 32, 32))
    flat = dicom(tmp_path / "flat.dcm", np.zeros((4, 4), dtype=np.uint16))
    with pytest.raises(DataError, match=r"flat\.dcm: a single 2D image, where 3D images are expected; set dimensions = 2"):
        read_image(flat, shape=(1, 32, 32, 32))
    nifti.save(nifti.Nifti1Image(np.zeros((5, 6, 7, 2), dtype=np.float32), np.eye(4)), tmp_path / "time.nii")
    with pytest.raises(DataError, match=r"time\.nii: .*not one volume"):
        decode(tmp_path / "time.nii")
