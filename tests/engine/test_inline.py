"""Two Flower apps in one process."""

from __future__ import annotations

import json
import logging
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.supercore.task_identity import TaskIdentity

from flpriv import data, engine
from flpriv.clients.app import app as our_client
from flpriv.engine.config import RunConfig
from flpriv.engine.inline import run_apps
from flpriv.errors import RunError
from flpriv.scenario import Scenario, parse
from flpriv.state import norm
from flpriv.store import open_capture
from flpriv.witness import read_witnesses

TINY = Path(__file__).parent.parent / "clients" / "tiny.py"


def arrays(*values: float) -> ArrayRecord:
    return ArrayRecord({"weight": torch.tensor(values)})


def adding_client() -> ClientApp:
    """Adds ``partition-id`` to the model, raises where the partition is 2, and counts its visits."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        place = int(context.node_config["partition-id"])
        if place == 2:
            raise ValueError("no power")
        seen: Any = context.state.get("seen", MetricRecord({"visits": 0}))
        context.state["seen"] = MetricRecord({"visits": seen["visits"] + 1})
        state: Any = message.content["arrays"]
        content = {
            "arrays": ArrayRecord({key: value + place for key, value in state.to_torch_state_dict().items()}),
            "metrics": MetricRecord({"num-examples": 1, "visits": seen["visits"] + 1}),
        }
        return Message(RecordDict(content), reply_to=message)  # type: ignore[arg-type]

    return app


def server(work: Callable[[Grid, Context], None]) -> ServerApp:
    app = ServerApp()
    app.main()(work)
    return app


def strategy() -> FedAvg:
    return FedAvg(fraction_evaluate=0.0)


def test_a_client_that_raises_does_not_end_the_round() -> None:
    results: list[Any] = []

    def work(grid: Grid, context: Context) -> None:
        results.append(strategy().start(grid, arrays(0.0, 1.0), num_rounds=3))
        messages = [Message(RecordDict({"arrays": arrays(0.0)}), node, "train") for node in grid.get_node_ids()]
        results.append([(message, reply) for message, reply in zip(messages, grid.send_and_receive(messages), strict=True)])

    run_apps(adding_client(), server(work), nodes=4, run_config={})
    averaged, pairs = results
    step = (0 + 1 + 3) / 3
    np.testing.assert_allclose(averaged.arrays["weight"].numpy(), [3 * step, 1 + 3 * step], rtol=1e-6)
    assert averaged.train_metrics_clientapp[3]["visits"] == 3
    (error,) = [reply.error for _, reply in pairs if reply.has_error()]
    assert (error.code, error.reason) == (ErrorCode.CLIENT_APP_RAISED_EXCEPTION, "<class 'ValueError'>:<'no power'>")
    for message, reply in pairs:
        assert reply.metadata.reply_to_message_id == message.metadata.message_id != ""
        assert reply.metadata.src_node_id == message.metadata.dst_node_id


def test_neither_side_can_change_what_the_other_holds() -> None:
    kept: list[Message] = []

    def client(message: Message, context: Context) -> Message:
        kept.append(message)
        state: Any = message.content["arrays"]
        state.to_torch_state_dict()["weight"].zero_()
        state.to_numpy_ndarrays(keep_input=True)[0][:] = 7
        state["weight"].data = b""
        state["more"] = state["weight"]
        config: Any = message.content["config"]
        config["list"].append(3)
        del message.content["config"]
        context.run_config["scenario"] = "another"
        message.metadata.dst_node_id = 5
        return Message(RecordDict({"arrays": arrays(2.0)}), dst_node_id=1, message_type="train")

    def work(grid: Grid, context: Context) -> None:
        content = RecordDict({"arrays": arrays(1.0), "config": ConfigRecord({"list": [1, 2]})})
        messages = [Message(content, node, "train") for node in grid.get_node_ids()]
        nodes = [message.metadata.dst_node_id for message in messages]
        replies: Any = list(grid.send_and_receive(messages))
        sent: Any = content["arrays"]
        assert sent["weight"].numpy().tolist() == [1.0]
        assert list(sent) == ["weight"]
        assert content["config"]["list"] == [1, 2]
        assert [message.metadata.dst_node_id for message in messages] == nodes
        assert context.run_config["scenario"] == "mine"
        replies[0].content["arrays"]["weight"].data = b""
        assert replies[1].content["arrays"]["weight"].numpy().tolist() == [2.0]

    run_apps(client, work, nodes=2, run_config={"scenario": "mine"})
    assert len(kept) == 2


def test_node_ids_follow_from_the_seed_and_tell_nothing_of_the_order() -> None:
    def places(seed: int) -> tuple[list[int], list[int]]:
        found: list[tuple[int, int]] = []

        def work(grid: Grid, context: Context) -> None:
            queries = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
            for reply in grid.send_and_receive(queries):
                site: Any = reply.content["site"]
                assert site["num-partitions"] == 20
                found.append((reply.metadata.src_node_id, site["partition-id"]))

        run_apps(our_client, work, nodes=20, run_config={}, seed=seed)
        return [node for node, _ in found], [place for _, place in found]

    nodes, order = places(1)
    assert places(1) == (nodes, order)
    assert places(2)[0] != nodes
    assert sorted(order) == list(range(20)) != order
    assert len(set(nodes)) == 20


def test_node_configs_are_added() -> None:
    seen: list[Any] = []

    def client(message: Message, context: Context) -> Message:
        seen.append(dict(context.node_config))
        return Message(RecordDict(), reply_to=message)

    def work(grid: Grid, context: Context) -> None:
        grid.send_and_receive([Message(RecordDict(), node, "train") for node in grid.get_node_ids()])

    run_apps(client, work, nodes=2, run_config={}, node_configs={1: {"site-folder": "/there"}})
    seen.sort(key=lambda config: config["partition-id"])
    assert seen == [
        {"partition-id": 0, "num-partitions": 2},
        {"partition-id": 1, "num-partitions": 2, "site-folder": "/there"},
    ]


def test_messages_may_be_pushed_and_pulled_later() -> None:
    def work(grid: Grid, context: Context) -> None:
        first, *_ = grid.get_node_ids()
        ids = list(grid.push_messages([Message(RecordDict({"arrays": arrays(0.0)}), first, "train")]))
        assert [reply.metadata.reply_to_message_id for reply in grid.pull_messages(ids)] == ids
        assert list(grid.pull_messages(ids)) == []
        assert grid.run.run_id == context.run_id
        assert [node.node_id for node in grid.get_nodes()] == list(grid.get_node_ids())

    run_apps(adding_client(), work, nodes=2, run_config={})


@pytest.mark.parametrize("fails", [False, True])
def test_the_process_is_left_as_it_was(fails: bool) -> None:
    def work(grid: Grid, context: Context) -> None:
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        assert logging.getLogger("flwr").level == logging.ERROR
        if fails:
            raise ZeroDivisionError

    def state() -> tuple[Any, ...]:
        numbers: Any = np.random.get_state()  # noqa: NPY002
        identity = (TaskIdentity._run_id, TaskIdentity._node_id, TaskIdentity._task_id)
        return random.getstate(), numbers[1].tolist(), torch.get_rng_state().tolist(), torch.get_num_threads(), identity

    before, level = state(), logging.getLogger("flwr").level
    if fails:
        with pytest.raises(ZeroDivisionError):
            run_apps(adding_client(), work, nodes=1, run_config={})
    else:
        run_apps(adding_client(), work, nodes=1, run_config={})
    assert state() == before
    assert logging.getLogger("flwr").level == level


def test_a_hundred_clients_are_quick(tmp_path: Path) -> None:
    made = scenario(tmp_path, sites={"sites": 100, "train": 8, "test": 4}, federation={"local": {"batch_size": 4}})
    data.records(made, 0, "train")
    results: list[Any] = []

    def work(grid: Grid, context: Context) -> None:
        initial = ArrayRecord(dict(data.task(made).build().state_dict()))
        results.append(FedAvg().start(grid, initial, num_rounds=3))

    config = RunConfig(scenario=made, setting=made.setting("none"), out=tmp_path / "out")
    start = time.process_time()
    run_apps(our_client, server(work), nodes=100, run_config=config.to_dict())
    assert time.process_time() - start < 15
    assert len(read_witnesses(tmp_path / "out")) == 300
    assert results[0].evaluate_metrics_clientapp[3]["loss"] < results[0].evaluate_metrics_clientapp[1]["loss"]


def scenario(root: Path, **tables: Any) -> Scenario:
    sites = {"source": "tiny", **tables.pop("sites", {})}
    tables = {"plugins": [], "model": {"name": "cnn", "width": 4}, "federation": {"rounds": 2}, **tables}
    return parse({**tables, "plugins": [str(TINY), *tables["plugins"]], "sites": sites}, root=root)


def test_a_setting_runs_to_its_result_and_gives_the_same_bits_again(tmp_path: Path) -> None:
    made = scenario(tmp_path)
    for name in ("one", "two"):
        engine.run(made, made.setting("none"), folder=tmp_path / name)
    first, second = (tmp_path / name / "final.safetensors" for name in ("one", "two"))
    assert first.read_bytes() == second.read_bytes()
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    assert [row["round"] for row in result["rounds"]] == [1, 2]
    assert result["events"] == []
    witnesses = read_witnesses(tmp_path / "one")
    assert witnesses == read_witnesses(tmp_path / "two")
    assert [(witness.site, witness.round) for witness in witnesses] == [(f"clinic {n}", r) for n in range(3) for r in (1, 2)]


def test_an_image_that_cannot_be_read_ends_the_run_before_it_starts(tmp_path: Path) -> None:
    made = scenario(tmp_path, sites={"unreadable": "1-4"})
    with pytest.raises(RunError, match=r"/secret/path/1-4\.png is truncated"):
        engine.run(made, made.setting("none"), folder=tmp_path / "out")


def test_fedprox_reaches_the_clients(tmp_path: Path) -> None:
    moved = []
    for mu in (0.0, 10.0):
        federation = {"rounds": 1, "strategy": "FedProx", "options": {"proximal_mu": mu}, "local": {"epochs": 3}}
        made = scenario(tmp_path, federation=federation)
        engine.run(made, made.setting("none"), folder=tmp_path / str(mu))
        witness, *_ = read_witnesses(tmp_path / str(mu))
        observation, *_ = open_capture(tmp_path / str(mu) / "capture").observations
        moved.append(float(norm(observation.update)))
        assert witness.node in open_capture(tmp_path / str(mu) / "capture").nodes
    assert moved[1] < 0.7 * moved[0]


SPOIL = '''
from dataclasses import dataclass
from flpriv.defense import Defense

@dataclass(frozen=True, kw_only=True)
class Spoil(Defense):
    """Return NaN from one site in one round."""
    name = "spoil"
    acts_on = "update"
    def protect(self, update, *, local):
        spoilt = (local.site, local.round) == ("clinic 1", 1)
        return {key: value * float("nan") for key, value in update.items()} if spoilt else update
'''


def test_a_nan_update_is_an_event_and_the_round_goes_on(tmp_path: Path) -> None:
    (tmp_path / "spoil.py").write_text(SPOIL)
    made = scenario(tmp_path, defenses={"spoil": {}}, plugins=[str(tmp_path / "spoil.py")])
    engine.run(made, made.setting("spoil"), folder=tmp_path / "out")
    (event,) = json.loads((tmp_path / "out" / "result.json").read_text())["events"]
    assert event["round"] == 1
    assert "round 1: the defended update: layer 'conv1.weight' holds NaN or infinite values" in event["what"]
    assert [(w.site, w.round) for w in read_witnesses(tmp_path / "out") if w.round == 1] == [("clinic 0", 1), ("clinic 2", 1)]
    assert all(state.isfinite().all() for state in open_capture(tmp_path / "out" / "capture").final.values())
