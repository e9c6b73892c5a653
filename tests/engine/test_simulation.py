"""Flower's simulation runtime: the captures of the inline engine, faults survived, nothing left behind."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv import scenario
from flpriv.capture import Observation
from flpriv.engine import inline, simulation
from flpriv.errors import RunError
from flpriv.store import open_capture
from flpriv.task import Task
from flpriv.witness import Witness, read_witness

SCENARIO = {
    "name": "two engines",
    "seed": 5,
    "sites": {"source": "phantom", "sites": 3, "patients": 8, "size": 16},
    "federation": {"rounds": 2, "options": {"fraction_train": 0.7}, "local": {"steps": 2, "batch_size": 3}},
}
TASK = Task(modality="xray", shape=(1, 2, 2), classes=("no", "yes"), model="cnn")

FAULTY = """
import os, signal
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp
from flwr.serverapp.strategy import FedAvg
from flpriv.strategies.wiretap import Wiretap

client = ClientApp()
server = ServerApp()

@client.train()
def train(message, context):
    place, round = context.node_config["partition-id"], message.content["config"]["server-round"]
    if (place, round) == (0, 1):
        raise ValueError("deliberate")
    if (place, round) == (1, 2):
        os.kill(os.getpid(), signal.SIGKILL)
    arrays = {key: value + place for key, value in message.content["arrays"].to_torch_state_dict().items()}
    content = {"arrays": ArrayRecord(arrays), "metrics": MetricRecord({"num-examples": 1})}
    return Message(RecordDict(content), reply_to=message)

@server.main()
def main(grid, context):
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=3, min_available_nodes=3)
    wiretap = Wiretap(strategy, str(context.run_config["out"]) + "/capture")
    wiretap.start(grid, ArrayRecord({"w": torch.zeros(4)}), num_rounds=5, timeout=120)
    with open(str(context.run_config["out"]) + "/events", "w") as file:
        file.writelines(f"{event.round} {event.what}\\n" for event in wiretap.history.events)
"""


def by_site(folder: Path) -> dict[tuple[int, str], tuple[Observation, Witness]]:
    """Observations by round and site, each with the site's witness."""
    witnesses = {(w.round, w.node): w for file in folder.glob("witness/*/round-*.json") for w in [read_witness(file)]}
    seen = open_capture(folder / "capture").observations
    found = {(one.round, one.node): one for one in seen if one.node is not None}
    return {(round, witnesses[round, node].site): (one, witnesses[round, node]) for (round, node), one in found.items()}


CANARIES = {"attack": "one-run-audit", "count": 10}


@pytest.mark.parametrize(
    ("options", "seen"),
    [
        ({}, 4),
        pytest.param({"attacks": {"sites": {**CANARIES, "level": "site"}}}, 18, marks=pytest.mark.slow),
        pytest.param({"attacks": {"records": {**CANARIES, "kind": "mislabelled"}}}, 4, marks=pytest.mark.slow),
    ],
)
def test_the_same_captures_on_both_engines(options: Mapping[str, Any], seen: int, tmp_path: Path) -> None:
    audit = scenario.parse({**SCENARIO, **options}, root=tmp_path)
    setting = audit.settings()[0]
    inline.run(audit, setting, folder=tmp_path / "inline")
    simulation.run(audit, setting, folder=tmp_path / "simulation")
    here, there = by_site(tmp_path / "inline"), by_site(tmp_path / "simulation")
    assert here.keys() == there.keys()
    assert len(here) == seen
    for key, (one, witness) in here.items():
        other, told = there[key]
        assert (witness.steps, one.examples) == (told.steps, other.examples)
        for layer in one.returned:
            torch.testing.assert_close(one.returned[layer], other.returned[layer], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(one.sent[layer], other.sent[layer], rtol=1e-5, atol=1e-6)
    finals = [open_capture(tmp_path / engine / "capture").final for engine in ("inline", "simulation")]
    for layer in finals[0]:
        torch.testing.assert_close(finals[0][layer], finals[1][layer], rtol=1e-5, atol=1e-6)
    assert left_behind() == []


@pytest.mark.slow
def test_a_raising_and_a_killed_client_do_not_end_the_run(tmp_path: Path) -> None:
    simulation.run_app(FAULTY, nodes=3, run_config={"out": str(tmp_path)}, what="faults")
    events = (tmp_path / "events").read_text().splitlines()
    assert [event.split()[0] for event in events] == ["1", "2"]
    assert "Message: deliberate" in events[0]
    assert "ray.exceptions.Actor" in events[1]
    capture = open_capture(tmp_path / "capture", task=TASK)
    assert [seen.round for seen in capture.observations] == [1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 5]
    assert len(capture.models) == 6


@pytest.mark.slow
def test_a_failed_run_is_an_error_with_the_end_of_the_log(tmp_path: Path) -> None:
    source = FAULTY.replace("strategy = FedAvg(", 'raise RuntimeError("the server broke")\n    strategy = FedAvg(')
    with pytest.raises(RunError, match=r"(?s)faults: the simulation ended as 'finished:failed'.*the server broke"):
        simulation.run_app(source, nodes=2, run_config={"out": str(tmp_path)}, what="faults")
    assert left_behind() == []


@pytest.mark.parametrize("while_training", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_an_interrupted_run_leaves_no_process_and_no_folder(while_training: bool, tmp_path: Path) -> None:
    def interrupt() -> None:
        if not while_training or list(tmp_path.glob("capture/round-0001/node-*")):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulation.run_app(FAULTY, nodes=3, run_config={"out": str(tmp_path)}, what="interrupted", progress=interrupt)
    assert left_behind() == []


def test_a_superlink_that_does_not_start_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "flower-superlink"
    tool.write_text("#!/bin/sh\necho no room here >&2\nexit 3\n")
    tool.chmod(0o700)
    monkeypatch.setattr(simulation, "_tool", lambda _: str(tool))
    with pytest.raises(RunError, match=r"(?s)setting 'x': Flower's SuperLink did not start:.*no room here"):
        simulation.run_app(FAULTY, nodes=2, run_config={}, what="setting 'x'")


def left_behind() -> list[str]:
    """Processes that carry the mark of a simulation started by this process."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            environment = (place / "environ").read_bytes()
        except OSError:
            continue
        if f"{simulation.MARK}=".encode() in environment and f"{simulation.OWNER}={os.getpid()}".encode() in environment:
            found.append(place.name)
    return found
