"""How the apps find their scenario."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, RecordDict

from flpriv.engine.config import RunConfig, read_run_config
from flpriv.errors import ScenarioError
from flpriv.scenario import parse

TABLES: dict[str, Any] = {"name": "trial", "seed": 3, "defenses": {"halve": {"defense": "top-k"}}}


def context(**run_config: Any) -> Context:
    return Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=run_config)


def test_what_is_written_is_read(tmp_path: Path) -> None:
    scenario = parse(TABLES, root=tmp_path)
    written = RunConfig(scenario=scenario, setting=scenario.setting("halve"), out=tmp_path, resume=True)
    read = read_run_config(context(**written.to_dict()))
    assert (read.scenario.to_json(), read.setting, read.out, read.resume) == (scenario.to_json(), written.setting, tmp_path, True)
    assert read_run_config(context(**written.to_dict())) is read


def test_a_file_of_either_kind_is_read_and_read_again_when_it_changes(tmp_path: Path) -> None:
    toml, text = tmp_path / "a.toml", tmp_path / "b.json"
    toml.write_text("seed = 4\n")
    text.write_text(json.dumps({"seed": 5}))
    assert read_run_config(context(scenario=str(toml))).scenario.seed == 4
    assert read_run_config(context(scenario=str(text))).scenario.seed == 5
    toml.write_text("seed = 444\n")
    found = read_run_config(context(scenario=str(toml)))
    assert found.scenario.seed == 444
    assert found.out == tmp_path / "runs" / "none"


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "no scenario"),
        ({"scenario": "/nowhere/a.json"}, "no such scenario: /nowhere/a.json"),
        ({"scenario": "{"}, "run-config: scenario: line 1"),
        ({"scenario": json.dumps(TABLES)}, "name one setting"),
        ({"scenario": json.dumps(TABLES), "setting": "halv"}, "unknown setting 'halv'; did you mean 'halve'"),
    ],
)
def test_mistakes_are_named(config: dict[str, str], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        read_run_config(context(**config))
