"""The inline engine stays close to a bare loop."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest


@pytest.mark.slow
def test_the_inline_engine_adds_less_than_a_tenth() -> None:
    found = runpy.run_path(str(Path(__file__).with_name("inline_overhead.py")))["measure"](turns=3)
    assert found["inline / bare, processor"] < 1.1
