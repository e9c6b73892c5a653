"""MedMNIST files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flpriv.errors import DataError
from flpriv.registry import create
from flpriv.site import SplitPlan, load, split_patients


def test_real_2d_file(test_data: Path) -> None:
    options: dict[str, Any] = {"root": str(test_data / "medmnist/pneumoniamnist.npz"), "size": 28, "limit": 120}
    source = create("sites", "npz", {**options, "classes": ["normal", "pneumonia"]})
    sites = split_patients(source.list(), SplitPlan())
    assert [len(site.entries) for site in sites] == [90, 90, 90, 90]
    records = load(sites[1], "public", shape=(1, 28, 28))
    with np.load(options["root"]) as archive:
        images, labels = archive["val_images"], archive["val_labels"]
    rows = [int(name.split("/")[1]) for name in records.ids]
    assert np.allclose(records.images[:, 0].numpy(), images[rows] / 255, atol=1e-6)
    assert records.labels.tolist() == labels[rows, 0].tolist()


def test_real_3d_file(test_data: Path) -> None:
    options = {"root": str(test_data / "medmnist/lidc_nodule3d.npz"), "dimensions": 3, "size": 16, "modality": "ct"}
    source = create("sites", "npz", options)
    assert source.classes == ("0", "1") and source.shape == (1, 16, 16, 16)
    sites = source.list()
    assert sum(len(site.entries) for site in sites) == 320
    image = np.asarray(sites[0].read(sites[0].entries[0]))
    assert image.shape == (1, 16, 16, 16) and 0 < image.mean() < 1
    with pytest.raises(DataError, match="are not 2D; set dimensions"):
        flat = create("sites", "npz", {**options, "dimensions": 2}).list()[0]
        flat.read(flat.entries[0])


def test_color_images_keep_their_channels(tmp_path: Path) -> None:
    images = np.zeros((8, 5, 5, 3), dtype=np.uint8)
    images[..., 1] = 255
    np.savez(tmp_path / "a.npz", train_images=images, train_labels=np.arange(8)[:, None] % 2)
    options = {"root": str(tmp_path / "a.npz"), "size": 5, "sites": 2}
    site = create("sites", "npz", {**options, "channels": 3}).list()[0]
    assert np.asarray(site.read(site.entries[0]))[:, 0, 0].tolist() == [0, 1, 0]
    assert np.asarray(create("sites", "npz", options).list()[0].read(site.entries[0])).shape == (1, 5, 5)


def test_wrong_files_are_named(tmp_path: Path) -> None:
    def opened(name: str, **options: Any) -> None:
        create("sites", "npz", {"root": str(tmp_path / name), **options})

    with pytest.raises(DataError, match=r"gone\.npz: no such npz file"):
        opened("gone.npz")
    (tmp_path / "text.npz").write_text("none")
    with pytest.raises(DataError, match=r"text\.npz: cannot be read as npz"):
        opened("text.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(DataError, match=r"other\.npz: has no train_labels"):
        opened("other.npz")
    np.savez(tmp_path / "multi.npz", train_images=np.zeros((4, 5, 5)), train_labels=np.zeros((4, 14), dtype=int))
    with pytest.raises(DataError, match=r"train_labels of shape \(4, 14\) are not one class number per image"):
        opened("multi.npz")
    np.savez(tmp_path / "three.npz", train_images=np.zeros((3, 5, 5)), train_labels=np.arange(3))
    with pytest.raises(DataError, match=r"holds label 2, but sites\.classes names only 2"):
        opened("three.npz", classes=["a", "b"])
