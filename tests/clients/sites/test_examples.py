"""The example scenarios read the data they are written for."""

from __future__ import annotations

from pathlib import Path

import pytest

from flpriv import data
from flpriv.errors import ScenarioError
from flpriv.scenario import read

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"


@pytest.mark.parametrize(("name", "sites", "shape"), [("xray_multisite", 5, (1, 64, 64)), ("ct_nodules", 4, (1, 32, 32, 32))])
def test_example(name: str, sites: int, shape: tuple[int, ...], test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLPRIV_TEST_DATA", str(test_data))
    scenario = read(EXAMPLES / f"{name}.toml")
    assert len(data.sites(scenario)) == sites
    records = data.records(scenario, 0, "train")
    assert records.images.shape[1:] == data.task(scenario).shape == shape
    assert len(records) >= 6 and float(records.images.std()) > 0.05
    folder = test_data / ("ct_3d" if name == "ct_nodules" else name)
    monkeypatch.delenv("FLPRIV_TEST_DATA")
    assert len(data.sites(read(EXAMPLES / f"{name}.toml", overrides=[f"sites.root={folder}"]))) == sites
    with pytest.raises(ScenarioError, match="FLPRIV_TEST_DATA is not set"):
        data.sites(read(EXAMPLES / f"{name}.toml"))
