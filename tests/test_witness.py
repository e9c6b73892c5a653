"""Witnesses on disk."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flpriv.clients.witness import log_error, write_witness
from flpriv.errors import CaptureError
from flpriv.witness import Witness, read_witnesses, site_folder

WITNESS = Witness(
    site="St Élisabeth",
    node=2**62 + 1,
    round=1,
    steps=(("b", "a"), ("a", "c"), ()),
    notes={"dp": {"epsilon": 1.5, "why": "noise"}},
)


def test_what_is_written_is_read_in_order(tmp_path: Path) -> None:
    others = [replace(WITNESS, round=2, refused="not today"), replace(WITNESS, site="B", round=12)]
    write_witness(site_folder(tmp_path, 1), others[1])
    write_witness(site_folder(tmp_path, 0), others[0])
    write_witness(site_folder(tmp_path, 0), replace(WITNESS, steps=()))
    write_witness(site_folder(tmp_path, 0), WITNESS)
    log_error(site_folder(tmp_path, 0), round=3, error=ValueError("x"))
    assert read_witnesses(tmp_path) == [WITNESS, *others]
    assert WITNESS.used == ("b", "a", "c")
    assert [file.name for file in site_folder(tmp_path, 0).iterdir() if file.name.startswith(".")] == []


def test_no_witnesses_are_no_error(tmp_path: Path) -> None:
    assert read_witnesses(tmp_path) == []


@pytest.mark.parametrize("text", ["", '{"site": "a"', "[]", '{"site": "a", "node": 1, "round": 1, "steps": 3, "notes": {}}'])
def test_a_damaged_witness_is_named(tmp_path: Path, text: str) -> None:
    write_witness(site_folder(tmp_path, 0), WITNESS)
    file = site_folder(tmp_path, 0) / "round-0001.json"
    file.write_text(text)
    with pytest.raises(CaptureError, match=str(file)):
        read_witnesses(tmp_path)
