"""Class folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from flpriv.errors import DataError, ScenarioError
from flpriv.registry import create
from flpriv.site import Site, SplitPlan, load, split_patients


def pictures(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((6, 6), 40, dtype=np.uint8)).save(root / name)
    return root


def opened(root: Path, **options: Any) -> tuple[Any, tuple[Site, ...]]:
    source = create("sites", "folder", {"root": str(root), "size": 8, **options})
    return source, source.list()


def test_kaggle_layout_of_real_xrays(test_data: Path) -> None:
    source, sites = opened(test_data / "xray_folder", size=32)
    assert source.classes == ("NORMAL", "PNEUMONIA") and source.shape == (1, 32, 32)
    entries = [entry for site in sites for entry in site.entries]
    assert len(entries) == 400 and [site.name for site in sites] == ["site-1", "site-2", "site-3", "site-4"]
    assert {(e.split, e.id.split("/")[0]) for e in entries} == {("train", "train"), ("test", "test")}
    assert {(e.label, e.id.split("/")[1]) for e in entries} == {(0, "NORMAL"), (1, "PNEUMONIA")}
    patients = {e.patient for e in entries if e.label == 1}
    assert len(patients) == 168 and all(p.startswith("person") for p in patients)
    held = [{e.patient for e in site.entries} for site in sites]
    assert sum(map(len, held)) == len(set.union(*held))
    records = load(split_patients(sites, SplitPlan())[0], "train", shape=source.shape)
    assert 0.2 < float(records.images.mean()) < 0.8


def test_training_and_testing_folders_and_plain_ones(test_data: Path) -> None:
    source, sites = opened(test_data / "brain_mri_folder", modality="mri", sites=3)
    assert source.classes == ("glioma", "meningioma", "notumor", "pituitary")
    assert {e.split for s in sites for e in s.entries} == {"train", "test"}
    source, sites = opened(test_data / "mednist_folder", classes=["Hand", "CXR"])
    assert {(e.label, e.id.split("/")[0]) for s in sites for e in s.entries} == {(0, "Hand"), (1, "CXR")}
    assert sum(len(s.entries) for s in sites) == 300
    everything = {e.split for s in split_patients(sites, SplitPlan()) for e in s.entries}
    assert everything == {"train", "test", "public"}


def test_patients_come_from_file_names(tmp_path: Path) -> None:
    names = [
        f"{split}/{kind}/person{n}_virus_{i}.png"
        for split, kind, n, i in (("train", "A", 1, 1), ("train", "A", 1, 2), ("test", "B", 2, 3))
    ]
    pictures(tmp_path, *names, "train/B/IM-0007-0001.png", "train/B/IM-0007-0002.png", "val/B/odd.png", "val/A/odd.png")
    _, sites = opened(tmp_path, sites=1)
    found = {e.id: (e.patient, e.split) for e in sites[0].entries}
    assert found["train/A/person1_virus_1.png"] == found["train/A/person1_virus_2.png"] == ("person1", "train")
    assert found["test/B/person2_virus_3.png"] == ("person2", "test")
    assert found["train/B/IM-0007-0001.png"][0] == "IM-0007"
    assert found["val/A/odd.png"] == ("val/A/odd.png", "public") != found["val/B/odd.png"]
    _, sites = opened(tmp_path, sites=1, pattern=r"_(\d+)\.png$", resplit=True)
    assert {e.patient for e in sites[0].entries} >= {"1", "2", "3"} and {e.split for e in sites[0].entries} == {""}


def test_a_patient_in_two_splits_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "train/A/person1_a_1.png", "test/A/person1_a_2.png", "train/B/x.png", "train/B/y.png")
    with pytest.raises(
        DataError, match=r"patient 'person1' is in two splits, test/A/person1_a_2.png and train/A/person1_a_1.png"
    ):
        opened(tmp_path, sites=1)
    opened(tmp_path, sites=1, resplit=True)


def test_wrong_folders_and_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone: no such folder"):
        opened(tmp_path / "gone")
    with pytest.raises(DataError, match="needs two or more class folders; found: none"):
        opened(tmp_path)
    pictures(tmp_path, "A/1.png", "B/2.png")
    with pytest.raises(DataError, match=r"no class folder 'C'; found: A, B"):
        opened(tmp_path, classes=["A", "C"])
    with pytest.raises(ScenarioError, match=r"needs a group"):
        opened(tmp_path, pattern="person")
    with pytest.raises(DataError, match="2 patients are too few for 4 sites"):
        opened(tmp_path)
    with pytest.raises(ScenarioError, match=r"unknown option 'partitions'; did you mean 'partition'"):
        opened(tmp_path, partitions="iid")
    with pytest.raises(ScenarioError, match=r"sites\.size = \[8, 8, 8\]: give one number, or 2"):
        opened(tmp_path, size=[8, 8, 8])
    with pytest.raises(ScenarioError, match=r"sites\.window"):
        opened(tmp_path, window=[400, -1000])


def test_a_damaged_image_is_named_when_it_is_read(tmp_path: Path) -> None:
    pictures(tmp_path, "A/1.png", "B/2.png", "B/3.png", "A/4.png")
    (tmp_path / "A/4.png").write_bytes(b"\x89PNG broken")
    source, sites = opened(tmp_path, sites=1)
    with pytest.raises(DataError, match=r"A/4\.png: cannot be read as an image"):
        load(split_patients(sites, SplitPlan(test=0, public=0))[0], "train", shape=source.shape)
