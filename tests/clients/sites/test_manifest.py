"""CSV tables: real ones, and every mistake named with its row."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
from PIL import Image

from flpriv import data
from flpriv.clients.sites.labelling import Rule, sex, years
from flpriv.errors import DataError, ScenarioError
from flpriv.registry import create
from flpriv.scenario import parse
from flpriv.site import Split, SplitPlan, split_patients

GOOD = [
    {
        "path": f"{n}.png",
        "patient_id": f"p{n // 2}",
        "site": "north" if n < 6 else "south",
        "label": "ill" if n % 4 < 2 else "well",
    }
    for n in range(12)
]


def table(root: Path, rows: list[dict[str, str]]) -> Path:
    """A table with its images."""
    for row in rows:
        if row.get("path"):
            Image.fromarray(np.full((6, 6), 99, dtype=np.uint8)).save(root / row["path"])
    with (root / "metadata.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(key for row in rows for key in row)))
        writer.writeheader()
        writer.writerows(rows)
    return root


def opened(root: Path, **options: Any) -> Any:
    return create("sites", "manifest", {"root": str(root), "size": 8, **options})


def changed(row: int, **cells: str) -> list[dict[str, str]]:
    """The good table with cells of one row changed, rows counted as in a spreadsheet."""
    return [{**cells_, **(cells if number == row else {})} for number, cells_ in enumerate(GOOD, start=2)]


def xrays(test_data: Path, **options: Any) -> dict[str, Any]:
    return {
        "source": "manifest",
        "root": str(test_data / "xray_multisite"),
        "size": 32,
        "classes": ["no finding", "finding"],
        "label_map": {"No Finding": "no finding"},
        "label_other": "finding",
        "label_empty": "drop",
        "columns": {"label": "finding"},
        **options,
    }


def test_five_real_sites_through_the_scenario(test_data: Path) -> None:
    scenario = parse({"sites": xrays(test_data)}, root=Path())
    sites = data.sites(scenario)
    assert {site.name: len(site.entries) for site in sites} == {
        "cases_iberia_italy": 65,
        "cases_world_other": 57,
        "guangzhou_wcmc": 119,
        "mhh_hannover": 150,
        "nih_cc": 200,
    }
    for site in sites:
        splits = [{e.patient for e in site.select(split)} for split in get_args(Split)]
        assert sum(map(len, splits)) == len(set.union(*splits)) and splits[0] and splits[1]
    records = data.records(scenario, 4, "train")
    assert records.images.shape[1:] == (1, 32, 32) and 0.3 < float(records.images.mean()) < 0.7
    assert set(records.labels.tolist()) == {0, 1} and set(records.attributes["sex"]) == {"F", "M"}
    assert all(1 <= int(age) <= 95 for age in records.attributes["age"])
    assert data.records(parse({"sites": xrays(test_data)}, root=Path()), 4, "train") is records


def test_real_multi_label_findings(test_data: Path) -> None:
    source = create(
        "sites",
        "manifest",
        {k: v for k, v in xrays(test_data).items() if k not in ("source", "label_map", "label_other", "label_empty", "classes")}
        | {
            "classes": ["other", "effusion"],
            "label_contains": {"effusion": "effusion"},
            "label_other": "other",
            "label_empty": "drop",
            "where": {"site": ["nih_cc", "guangzhou_wcmc"]},
            "attributes": ["view"],
        },
    )
    china, nih = source.list()
    with (test_data / "xray_multisite/metadata.csv").open(encoding="utf-8") as file:
        expected = sum("Effusion" in row["finding"] for row in csv.DictReader(file) if row["site"] == "nih_cc")
    assert sum(e.label for e in nih.entries) == expected > 10
    assert sum(e.label for e in china.entries) == 0
    assert {e.attributes["view"] for e in nih.entries} == {"AP", "PA"}


def test_real_nodules_by_diameter_at_virtual_sites(test_data: Path) -> None:
    options = {
        "root": str(test_data / "ct_3d"),
        "modality": "ct",
        "dimensions": 3,
        "size": 16,
        "window": [-1000, 400],
        "classes": ["small", "large"],
        "label_threshold": 10,
        "where": {"kind": "nodule_patch"},
    }
    sites = create("sites", "manifest", options).list()
    assert [len(site.entries) for site in sites] == [10, 10, 10, 10]
    with (test_data / "ct_3d/metadata.csv").open(encoding="utf-8") as file:
        rows = {row["path"]: row["label"] for row in csv.DictReader(file)}
    for site in sites:
        for entry in site.entries:
            assert entry.label == (float(rows[entry.id].split("=")[1]) >= 10)
    image = np.asarray(sites[0].read(sites[0].entries[0]))
    assert image.shape == (1, 16, 16, 16) and image[0, 6:10, 6:10, 6:10].mean() > 0.3
    skewed = create("sites", "manifest", {**options, "sites": 3, "partition": "dirichlet", "alpha": 0.4, "seed": 2}).list()
    assert sum(len(site.entries) for site in skewed) == 40 and len(skewed) == 3
    with pytest.raises(ScenarioError, match="name the classes"):
        create("sites", "manifest", {**options, "classes": []})


def test_real_dicom_and_ct_slices(test_data: Path) -> None:
    files = {"root": str(test_data / "dicom"), "columns": {"label": "sex", "patient_id": "", "site": "manufacturer"}, "size": 24}
    source = create(
        "sites",
        "manifest",
        {
            **files,
            "modality": "ct",
            "window": [-1000, 400],
            "where": {"modality": "CT"},
            "label_other": "drop",
            "classes": ["F", "M"],
            "label_empty": "drop",
        },
    )
    counts = {site.name: len(site.entries) for site in source.list()}
    assert counts == {"GE MEDICAL SYSTEMS": 6, "SIEMENS": 4, "TOSHIBA": 1}
    for site in source.list():
        for entry in site.entries:
            assert np.asarray(site.read(entry)).shape == (1, 24, 24)
            assert entry.attributes["age"].isdigit()
    slices = create(
        "sites", "manifest", {"root": str(test_data / "ct_2d"), "columns": {"label": "sex"}, "modality": "ct", "size": 24}
    )
    assert len(slices.list()) == 8 and slices.classes == ("F", "M")


def test_a_small_table(tmp_path: Path) -> None:
    source = opened(table(tmp_path, GOOD))
    north, south = source.list()
    assert source.classes == ("ill", "well") and (north.name, south.name) == ("north", "south")
    assert [e.label for e in north.entries] == [0, 0, 1, 1, 0, 0]
    assert north.entries[0].attributes == {"age": "", "sex": ""}
    assert np.allclose(north.read(north.entries[0]), 99 / 255)
    merged = opened(tmp_path, partition="iid", sites=3, seed=1).list()
    assert [site.name for site in merged] == ["site-1", "site-2", "site-3"]
    assert Counter(len(site.entries) for site in merged) == {4: 3}


def test_explicit_splits(tmp_path: Path) -> None:
    rows = [{**row, "split": ("train", "Test", "val")[n // 2 % 3]} for n, row in enumerate(GOOD)]
    sites = opened(table(tmp_path, rows)).list()
    assert [e.split for e in sites[0].entries] == ["train", "train", "test", "test", "public", "public"]
    assert {e.split for s in opened(tmp_path, resplit=True).list() for e in s.entries} == {""}
    assert split_patients(sites, SplitPlan())[0].entries == sites[0].entries


@pytest.mark.parametrize(
    ("row", "cells", "message"),
    [
        (5, {"label": "sick"}, r"unknown label 'sick'; classes: ill, well"),
        (5, {"label": ""}, r"the label is empty; set label_empty"),
        (6, {"patient_id": ""}, r"column 'patient_id' is empty"),
        (7, {"path": "0.png"}, r"image '0.png' is in row 2 already"),
        (9, {"patient_id": "p0"}, r"patient 'p0' is at site 'south', but at 'north' in row 2"),
        (3, {"split": "test"}, r"patient 'p0' is in split 'test', but in 'empty' in row 2"),
        (3, {"split": "tests"}, r"unknown split 'tests'; did you mean 'test'"),
        (4, {"age": "old"}, r"age 'old' is no number of years"),
    ],
)
def test_a_wrong_row_is_named(tmp_path: Path, row: int, cells: dict[str, str], message: str) -> None:
    table(tmp_path, changed(row, **cells))
    with pytest.raises(DataError, match=rf"metadata\.csv: row {row}: {message}") as caught:
        opened(tmp_path, classes=["ill", "well"]).list()
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_named_with_its_row(tmp_path: Path) -> None:
    table(tmp_path, GOOD)
    (tmp_path / "4.png").unlink()
    with pytest.raises(DataError, match=r"metadata\.csv: row 6: no such image: .*4\.png"):
        opened(tmp_path).list()


def test_wrong_tables_and_columns_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"metadata\.csv: no such table; set sites\.root"):
        opened(tmp_path)
    table(tmp_path, GOOD)
    with pytest.raises(DataError, match=r"row 1: no column 'finding'.*; set sites\.columns\.label"):
        opened(tmp_path, columns={"label": "finding"})
    with pytest.raises(DataError, match=r"row 1: no column 'sitee'; did you mean 'site'\?; set sites\.columns\.site"):
        opened(tmp_path, columns={"site": "sitee"})
    with pytest.raises(DataError, match=r"row 1: no column 'kind'.*; set sites\.where\.kind"):
        opened(tmp_path, where={"kind": "x"})
    with pytest.raises(DataError, match="no row left to use"):
        opened(tmp_path, where={"site": "west"}, classes=["ill", "well"]).list()
    with pytest.raises(ScenarioError, match=r"the rule for 'x' names an unknown class 'illl'; did you mean 'ill'"):
        opened(tmp_path, classes=["ill", "well"], label_map={"x": "illl"})
    with pytest.raises(ScenarioError, match=r"columns\.lable"):
        opened(tmp_path, columns={"lable": "label"})
    with (tmp_path / "metadata.csv").open("a", encoding="utf-8") as file:
        file.write("12.png,p9\n")
    with pytest.raises(DataError, match=r"row 14: has fewer fields than the header"):
        opened(tmp_path, classes=["ill", "well"]).list()
    (tmp_path / "metadata.csv").write_bytes(b"path,patient_id,label\n\xff\xfe,1,2\n")
    with pytest.raises(DataError, match=r"metadata\.csv: cannot be read as CSV"):
        opened(tmp_path)


def test_label_rules() -> None:
    rule = Rule(classes=["no", "yes"], map={"odd": "drop"}, contains={"Mass": "yes"}, threshold=10, other="no", empty="no")
    expected = {
        "odd": "drop",
        "Edema|Mass": "yes",
        "mass": "yes",
        "Massive": "no",
        "d_mm=12": "yes",
        "d2_mm=9.5": "no",
        "": "no",
        "yes": "yes",
    }
    assert {text: rule(text) for text in expected} == expected
    with pytest.raises(ValueError, match="unknown label 'x'"):
        Rule(classes=["a", "b"])("x")


def test_ages_and_sexes_as_tables_write_them() -> None:
    ages = {"58": "58", "58.0": "58", "058Y": "58", "006M": "0", "018M": "1", "": "", "NA": "", "0": "0"}
    assert {text: years(text) for text in ages} == ages
    for text in ("old", "-3", "200", "411Y"):
        with pytest.raises(ValueError, match="age"):
            years(text)
    assert [sex(text) for text in ("F", "female", "M", "Male", "O", "")] == ["F", "F", "M", "M", "", ""]
