"""The exposure table from one command."""

from __future__ import annotations

from pathlib import Path

import pytest

from flpriv import audit, data
from flpriv.finding import Finding, Verdict
from flpriv.report import write
from flpriv.report.exposure import Exposure, exposure
from flpriv.scenario import Scenario, read

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
ROWS = ["Centralised", "Federated, IID", "Federated, own sites", "+ dp-sgd", "+ synthetic", "Untrained"]


def names(table: Exposure) -> list[str]:
    return [row.name for row in table.rows if not row.name.startswith("Siloed (")]


def overall(verdict: Verdict) -> list[Finding]:
    return [finding for finding in verdict.findings if not finding.site]


@pytest.mark.parametrize("name", ["exposure_ct", "exposure_xray"])
def test_both_scenarios_ask_the_same(name: str, test_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLPRIV_TEST_DATA", str(test_data))
    scenario = read(EXAMPLES / f"{name}.toml")
    audit.check(scenario)
    assert scenario.compare == ("centralised", "siloed", "iid", "none", "dp-sgd", "synthetic", "untrained")
    assert [spec.options.get("attribute", "site") for spec in scenario.attacks] == ["site", "sex", "age"]
    assert all(int(spec.options["repeats"]) >= 5 for spec in scenario.attacks)
    assert scenario.threat_table.exposed == 0.1
    assert len(data.sites(scenario)) == 5


def small(seed: int) -> Scenario:
    smaller = [
        "sites.dimensions=2",
        "sites.patients=24",
        "sites.size=16",
        "federation.rounds=1",
        f"seed={seed}",
        "model.widen=0.05",
    ]
    smaller += [f"attacks.{attack}.repeats=1" for attack in ("site", "sex", "age")]
    return read(EXAMPLES / "exposure_ct.toml", overrides=[*smaller, "threat.exposed=0.3"])


@pytest.mark.slow
def test_the_table_from_images_to_page(tmp_path: Path) -> None:
    verdict = audit.run(small(1), out=tmp_path / "run")
    assert {finding.status for finding in overall(verdict)} == {"ok"}
    table = exposure(verdict)
    assert table is not None
    assert table.attacks == ("site", "sex", "age")
    assert names(table) == ROWS
    assert len(table.rows) == 7
    assert all(cell.accuracy and cell.f1 and cell.lift for row in table.rows for cell in row.cells)
    assert all(row.auroc for row in table.rows)
    assert {baseline.name for baseline in table.baselines} == {"majority class", "untrained backbone", "pixel statistics"}
    page = write([verdict], tmp_path / "report.html").read_text(encoding="utf-8")
    assert all(f'<th scope="row"{place}>{name}</th>' in page for name in ROWS for place in [' class="on-top"' * (name[0] == "+")])
    synthetic = next(setting for setting in verdict.settings if setting.id == "synthetic")
    assert synthetic.utility != next(setting for setting in verdict.settings if setting.id == "none").utility
