"""Verdicts on disk: the same comes back, private, whole or not at all."""

from __future__ import annotations

import json
import stat
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flpriv import verdicts
from flpriv.errors import CaptureError
from flpriv.files import write_private
from flpriv.finding import Metric, Verdict


def same(one: Any, other: Any) -> bool:
    """Equality that looks into arrays and tells dtypes apart."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if is_dataclass(one):
        return type(one) is type(other) and all(same(getattr(one, f.name), getattr(other, f.name)) for f in fields(one))
    if isinstance(one, tuple):
        return isinstance(other, tuple) and len(one) == len(other) and all(map(same, one, other))
    return bool(one == other) and type(one) is type(other)


def test_round_trip(verdict: Verdict, tmp_path: Path) -> None:
    verdicts.save(verdict, tmp_path / "run")
    assert same(verdicts.load(tmp_path / "run"), verdict)


def test_numbers_that_are_not_finite_survive(small: Verdict, verdict: Verdict, tmp_path: Path) -> None:
    endless = Metric(name="PSNR", value=float("inf"), low=float("-inf"), n=1, unit="dB")
    finding = replace(verdict.findings[0], headline=endless, metrics=(endless,))
    verdicts.save(replace(small, findings=(finding,)), tmp_path)
    assert verdicts.load(tmp_path).findings[0].headline == endless
    json.loads((tmp_path / "verdict.json").read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_files_are_private_and_hold_no_pickle(verdict: Verdict, tmp_path: Path) -> None:
    verdicts.save(verdict, tmp_path / "run")
    assert stat.S_IMODE((tmp_path / "run").stat().st_mode) == 0o700
    files = sorted((tmp_path / "run").iterdir())
    assert [file.suffix for file in files] == [".safetensors", ".json"] or [f.suffix for f in files] == [".json", ".safetensors"]
    assert all(stat.S_IMODE(file.stat().st_mode) == 0o600 for file in files)


def test_saving_again_leaves_one_file_of_arrays(verdict: Verdict, small: Verdict, tmp_path: Path) -> None:
    verdicts.save(verdict, tmp_path)
    verdicts.save(small, tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    assert same(verdicts.load(tmp_path), small)


def test_an_interrupted_save_leaves_the_earlier_verdict(
    verdict: Verdict, small: Verdict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    verdicts.save(small, tmp_path)

    def full(path: Path, content: bytes) -> None:
        if path.suffix == ".json":
            raise CaptureError("disk full")
        write_private(path, content)

    monkeypatch.setattr("flpriv.verdicts.write_private", full)
    with pytest.raises(CaptureError, match="disk full"):
        verdicts.save(verdict, tmp_path)
    assert same(verdicts.load(tmp_path), small)


def test_no_verdict(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match=r"no verdict\.json there"):
        verdicts.load(tmp_path)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"version": 1', '"version": 99'),
        ('"level": "critical"', '"level": "dreadful"'),
        ('"title"', '"titel"'),
        ('"arrays": "verdict-', '"arrays": "../verdict-'),
        ("{", ""),
    ],
)
def test_damage_is_told_by_file(verdict: Verdict, tmp_path: Path, old: str, new: str) -> None:
    file = verdicts.save(verdict, tmp_path)
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new, 1))
    with pytest.raises(CaptureError, match=r"verdict\.json: "):
        verdicts.load(tmp_path)


def test_truncated_arrays_are_told(verdict: Verdict, tmp_path: Path) -> None:
    verdicts.save(verdict, tmp_path)
    arrays = next(tmp_path.glob("*.safetensors"))
    arrays.write_bytes(arrays.read_bytes()[:-100])
    with pytest.raises(CaptureError, match="damaged"):
        verdicts.load(tmp_path)
