"""The ServerApp on the inline engine: what it leaves, in which order it asks, how it fails and goes on."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Error, Message
from safetensors.torch import load_file

import flpriv
from flpriv import data, scenario
from flpriv.clients.app import app as client
from flpriv.engine import inline
from flpriv.engine.config import RunConfig
from flpriv.errors import RunError
from flpriv.scenario import Scenario
from flpriv.store import finished_rounds, open_capture
from flpriv.strategies.server import OrderedGrid
from flpriv.strategies.server import app as server
from flpriv.witness import read_witness

TABLES: Mapping[str, Any] = {
    "name": "server",
    "seed": 5,
    "sites": {"source": "phantom", "sites": 3, "patients": 8, "size": 16},
    "federation": {"rounds": 3, "local": {"steps": 1, "batch_size": 2}},
}


def audit(**tables: Any) -> Scenario:
    return scenario.parse({**TABLES, **tables}, root=Path.cwd())


def run(folder: Path, which: Scenario, *, app: Any = client, resume: bool = False, **config: Any) -> dict[str, Any]:
    """Run the first setting inline; its ``result.json``."""
    folder.mkdir(exist_ok=True)
    told = RunConfig(scenario=which, setting=which.settings()[0], out=folder, resume=resume).to_dict()
    inline.run_apps(app, server, nodes=len(data.sites(which)), run_config=told | config, seed=which.seed)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def test_what_a_setting_leaves(tmp_path: Path) -> None:
    which = audit()
    result = run(tmp_path / "s", which)
    assert [row["round"] for row in result["rounds"]] == [1, 2, 3]
    assert all(row["train"]["loss"] > 0 and 0 <= row["evaluate"]["accuracy"] <= 1 for row in result["rounds"])
    assert result["events"] == []
    assert result["seconds"] > 0
    capture = open_capture(tmp_path / "s" / "capture")
    assert (capture.task, len(capture.observations), len(capture.models)) == (data.task(which), 9, 4)
    assert capture.observations[0].local == which.federation.local
    final = load_file(tmp_path / "s" / "final.safetensors")
    assert all(torch.equal(final[key], value) for key, value in capture.final.items())


def test_what_the_adversary_knows_of_the_defences(tmp_path: Path) -> None:
    """The whole stack in order, options left at their defaults included; nothing without the capability."""
    tables = {
        "defenses": {"few": {"defense": "top-k"}, "clip": {"defense": "gaussian", "max_grad_norm": 2.0}},
        "compare": ["clip+few"],
    }
    run(tmp_path / "known", audit(**tables))
    run(tmp_path / "denied", audit(**tables, threat={"deny": ["know-defenses"]}))
    known = [seen.defenses for seen in open_capture(tmp_path / "known" / "capture").observations]
    clip = {"max_grad_norm": 2.0, "noise_multiplier": 0.1, "formal": False, "delta": 1e-5}
    assert known == [(("gaussian", clip), ("top-k", {"keep": 0.1}))] * 9
    assert [seen.defenses for seen in open_capture(tmp_path / "denied" / "capture").observations] == [None] * 9


def test_the_bare_strategy_gives_the_same_weights(tmp_path: Path) -> None:
    which = audit(federation=TABLES["federation"] | {"options": {"fraction_train": 0.7}})
    run(tmp_path / "tapped", which)
    run(tmp_path / "bare", which, wiretap=0)
    assert (tmp_path / "tapped" / "final.safetensors").read_bytes() == (tmp_path / "bare" / "final.safetensors").read_bytes()
    assert not (tmp_path / "bare" / "capture").exists()


def test_sites_are_asked_in_the_order_of_their_partitions(tmp_path: Path) -> None:
    place: dict[int, int] = {}

    def listening(message: Message, context: Context) -> Message:
        place[context.node_id] = int(context.node_config["partition-id"])
        return client(message, context)

    def look(grid: Any, _: Context) -> None:
        ordered = OrderedGrid.wait(grid, 5, timeout=1)
        assert [place[node] for node in ordered.get_node_ids()] == [0, 1, 2, 3, 4]
        assert sorted(place) != [node for node, _ in sorted(place.items(), key=lambda item: item[1])]
        with pytest.raises(RunError, match=r"5 of 6 sites connected within 0\.3 s"):
            OrderedGrid.wait(grid, 6, timeout=0.3)

    told = RunConfig(scenario=audit(), setting=audit().settings()[0], out=tmp_path).to_dict()
    inline.run_apps(listening, look, nodes=5, run_config=told, seed=1)


def test_refusing_sites_do_not_keep_the_run_from_ending(tmp_path: Path) -> None:
    def refusing(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "query":
            return client(message, context)
        return Message(Error(6, "guard: no"), reply_to=message)

    result = run(tmp_path / "s", audit(), app=refusing)
    assert len(result["events"]) == 3 * 3 * 2
    assert result["events"][0]["what"] == "refused: guard: no"
    assert result["events"][0]["who"].isdigit()
    assert all(row["train"] == row["evaluate"] == {} for row in result["rounds"])
    capture = open_capture(tmp_path / "s" / "capture")
    assert capture.observations == ()
    assert (tmp_path / "s" / "final.safetensors").is_file()


@pytest.mark.parametrize("strategy", ["FedAvg", "FedAdam"])
def test_a_killed_run_resumes_to_the_same_weights_and_captures(strategy: str, tmp_path: Path) -> None:
    which = audit(federation=TABLES["federation"] | {"strategy": strategy, "options": {"fraction_train": 0.7}})
    whole = run(tmp_path / "whole", which)

    def dying(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train" and message.content.config_records["config"]["server-round"] == 2:
            raise KeyboardInterrupt
        return client(message, context)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", which, app=dying)
    assert finished_rounds(tmp_path / "killed" / "capture") == (1,)
    resumed = run(tmp_path / "killed", which, resume=True)
    assert resumed["rounds"] == whole["rounds"]
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (tmp_path / "killed" / "final.safetensors").read_bytes()
    first, second = (open_capture(tmp_path / name / "capture").observations for name in ("whole", "killed"))
    assert [(one.round, one.node) for one in first] == [(one.round, one.node) for one in second]
    for one, other in zip(first, second, strict=True):
        assert all(torch.equal(one.returned[key], other.returned[key]) for key in one.returned)
    witnesses = [read_witness(file) for file in (tmp_path / "killed").glob("witness/*/round-*.json")]
    assert {(w.round, w.node) for w in witnesses} == {(one.round, one.node) for one in second}


def test_resume_without_a_checkpoint_starts_anew(tmp_path: Path) -> None:
    which = audit()
    run(tmp_path / "whole", which)
    run(tmp_path / "resumed", which, resume=True)
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (tmp_path / "resumed" / "final.safetensors").read_bytes()


WORKER = """
import json, sys
from pathlib import Path
from flpriv import scenario
from flpriv.engine import inline
which = scenario.parse(json.loads(sys.argv[1]), root=Path.cwd())
Path(sys.argv[2], "started").touch()
inline.run(which, which.settings()[0], folder=Path(sys.argv[2]), resume=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_kill_9_at_any_moment_loses_no_finished_round(seed: int, tmp_path: Path) -> None:
    which = audit(federation=TABLES["federation"] | {"rounds": 40, "strategy": "FedAdam"})
    run(tmp_path / "whole", which)
    out, rng, done = tmp_path / "killed", random.Random(seed), 0
    out.mkdir()
    environment = os.environ | {"PYTHONPATH": str(Path(next(iter(flpriv.__path__))).parent)}
    while not (out / "result.json").exists():
        (out / "started").unlink(missing_ok=True)
        with subprocess.Popen([sys.executable, "-c", WORKER, which.to_json(), str(out)], env=environment) as worker:
            while worker.poll() is None and not (out / "started").exists():
                time.sleep(0.05)
            time.sleep(3 + rng.uniform(0, 3))
            worker.kill()
        if (out / "capture").exists():
            assert len(open_capture(out / "capture").observations) == 3 * len(finished_rounds(out / "capture"))
        checkpoints = [int(path.stem.removeprefix("round-")) for path in (out / "checkpoint").glob("round-*.json")]
        assert len(finished_rounds(out / "capture")) >= max(checkpoints, default=0) >= done
        done = max(checkpoints, default=0)
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (out / "final.safetensors").read_bytes()
    assert finished_rounds(out / "capture") == tuple(range(1, 41))
