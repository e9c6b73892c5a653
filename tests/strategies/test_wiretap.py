"""The wiretap around many strategies: invisible when passive, exact in what it records, steady under faults."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import FedAvg, Result, Strategy
from torch import Tensor

from flpriv.attack import Trap
from flpriv.capture import Capture
from flpriv.errors import ThreatError
from flpriv.state import State, parameters
from flpriv.store import Sink, open_capture
from flpriv.strategies.wiretap import Wiretap
from flpriv.task import Task
from flpriv.threat import NAMED, Can

Honest = Callable[[], Message]
Fault = Callable[[Message, Honest], Message]
TASK = Task(modality="xray", shape=(1, 2, 3), classes=("no", "yes"), model="cnn")
CURIOUS = NAMED["honest-but-curious"]
MALICIOUS = NAMED["malicious-server"]


class UsersOwn(FedAvg):
    """A strategy as users write them: a ``start`` and state of its own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.seen: list[int] = []

    def start(self, grid: Any, initial_arrays: ArrayRecord, num_rounds: int = 3, *args: Any, **options: Any) -> Result:
        self.seen.append(num_rounds)
        return super().start(grid, initial_arrays, num_rounds, *args, **options)


def noisy() -> Strategy:
    return flower.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 1.0, 4)


STRATEGIES: Mapping[str, Callable[[], Strategy]] = {
    "FedAvg": FedAvg,
    "half of the sites": lambda: FedAvg(fraction_train=0.5, min_train_nodes=1),
    "FedProx": lambda: flower.FedProx(proximal_mu=0.1),
    "FedAvgM": lambda: flower.FedAvgM(server_momentum=0.9, server_learning_rate=0.5),
    "FedAdam": flower.FedAdam,
    "Krum": lambda: flower.Krum(num_malicious_nodes=1),
    "FedMedian": flower.FedMedian,
    "server-side noise": noisy,
    "user's own": UsersOwn,
}


def seeded() -> None:
    random.seed(3)
    np.random.seed(3)  # noqa: NPY002


def same(first: ArrayRecord, second: ArrayRecord) -> bool:
    return list(first) == list(second) and all(first[key].data == second[key].data for key in first)


def tapped(folder: Path, honest: Strategy, **options: Any) -> Wiretap:
    return Wiretap(honest, Sink(folder, granted=CURIOUS, task=TASK), **options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_passive_wiretap_leaves_the_weights_bit_identical(name: str, tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    seeded()
    bare = STRATEGIES[name]().start(tiny(), initial, num_rounds=3)
    seeded()
    heard = tapped(tmp_path / "c", STRATEGIES[name](), checkpoints=tmp_path / "k").start(tiny(), initial, num_rounds=3)
    assert same(bare.arrays, heard.arrays)
    assert not same(heard.arrays, initial)
    assert bare.train_metrics_clientapp == heard.train_metrics_clientapp
    assert bare.evaluate_metrics_clientapp == heard.evaluate_metrics_clientapp


def test_two_lines_around_a_users_own_strategy(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    honest = UsersOwn()
    Wiretap(honest, sink=tmp_path / "capture").start(tiny(), initial, num_rounds=2)
    assert honest.seen == [2]
    assert "start" not in vars(honest)
    assert "configure_train" not in vars(honest)
    assert len(open_capture(tmp_path / "capture", task=TASK).observations) == 8


def test_the_capture_is_what_was_sent_and_returned(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    grid = tiny()
    result = tapped(tmp_path / "c", FedAvg()).start(grid, initial, num_rounds=2)
    capture = open_capture(tmp_path / "c")
    assert capture.nodes == (11, 12, 13, 14)
    sent = {(round, node): state for round, node, state, _ in grid.received}
    assert [(seen.round, seen.node) for seen in capture.observations] == [
        (1, 11),
        (1, 12),
        (1, 13),
        (1, 14),
        (2, 11),
        (2, 12),
        (2, 13),
        (2, 14),
    ]
    for seen in capture.observations:
        assert seen.node is not None
        assert equal(seen.sent, sent[seen.round, seen.node])
        assert seen.examples == seen.node
        assert seen.metrics["loss"] > 0
        assert set(seen.update) == {"0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias"}
        assert float(seen.update["0.weight"].abs().sum()) > 0
    assert len(capture.models) == 3
    assert equal(capture.models[0], initial.to_torch_state_dict())
    assert equal(capture.final, result.arrays.to_torch_state_dict())
    assert len(list((tmp_path / "c" / "round-0001").glob("sent-*"))) == 1


def equal(first: State, second: State) -> bool:
    return set(first) == set(second) and all(torch.equal(first[key], second[key]) for key in first)


class OneNode(Trap):
    """Sends node 12 a model with another layer, in every round it may."""

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        return {"extra": torch.ones(3), **{key: value + 1 for key, value in honest.items()}} if node == 12 else None

    @property
    def secrets(self) -> dict[str, Tensor]:
        return {"bins": torch.arange(3.0)}


class Widened(OneNode):
    """As above, with a first layer wider than the honest one."""

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        return {**honest, "0.weight": torch.ones(9, 6), "0.bias": torch.ones(9)} if node == 12 else None


def echo(message: Message, _: Honest) -> Message:
    """Returns what it was sent, one added to every parameter."""
    state = message.content.array_records["arrays"].to_torch_state_dict()
    moved = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    return Message(
        RecordDict({"arrays": ArrayRecord(moved), "metrics": MetricRecord({"num-examples": 2, "loss": 1.0})}), reply_to=message
    )


def malicious(folder: Path, trap: Trap, **options: Any) -> Wiretap:
    return Wiretap(FedAvg(), Sink(folder, granted=MALICIOUS, task=TASK), trap=trap, label="imprint", **options)


@pytest.mark.parametrize("trap", [OneNode(), Widened()])
def test_a_trap_reaches_its_node_alone(trap: Trap, tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    grid = tiny(faults={(round, node): echo for round in (1, 2) for node in (11, 12, 13, 14)})
    honest = initial.to_torch_state_dict()
    result = malicious(tmp_path / "c", trap, architecture="imprint", tamper_rounds=(1,)).start(grid, initial, num_rounds=2)
    capture = open_capture(tmp_path / "c")
    labels = {(round, node): config.get("architecture") for round, node, _, config in grid.received}
    assert labels == {(round, node): "imprint" if (round, node) == (1, 12) else None for round in (1, 2) for node in grid.nodes}
    for round, node, state, _ in grid.received:
        if round == 1 and node != 12:
            assert equal(state, honest)
    assert [(seen.round, seen.node) for seen in capture.observations if seen.trap] == [(1, 12)]
    armed = next(seen for seen in capture.observations if seen.trap)
    assert equal(armed.sent, trap.arm(honest, round=1, node=12, nodes=(12,)) or {})
    assert list(result.arrays) == list(initial)
    moved = result.arrays.to_torch_state_dict()
    assert torch.allclose(moved["3.weight"], honest["3.weight"] + 2)


def test_only_the_first_nodes_asked_are_victims(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    class Everybody(Trap):
        def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
            return {key: value + 1 for key, value in honest.items()}

    malicious(tmp_path / "c", Everybody(), victims=2).start(tiny(), initial, num_rounds=1)
    seen = open_capture(tmp_path / "c").observations
    victims = {one.node for one in seen if one.trap}
    assert len(victims) == 2 < len(seen) and all(set(one.nodes) == victims for one in seen)


def test_secrets_are_stored(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    grid = tiny(faults={(1, node): echo for node in (11, 12, 13, 14)})
    malicious(tmp_path / "c", OneNode()).start(grid, initial, num_rounds=1)
    assert torch.equal(open_capture(tmp_path / "c").secrets["bins"], torch.arange(3.0))
    assert all("architecture" not in config for *_, config in grid.received)


def test_a_trap_needs_tamper(tmp_path: Path) -> None:
    with pytest.raises(ThreatError, match="tamper"):
        tapped(tmp_path / "c", FedAvg(), trap=OneNode())


def with_arrays(change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> Fault:
    def fault(_: Message, honest: Honest) -> Message:
        reply = honest()
        reply.content["arrays"] = ArrayRecord(change(reply.content.array_records["arrays"].to_torch_state_dict()))
        return reply

    return fault


def with_metrics(metrics: dict[str, Any]) -> Fault:
    def fault(_: Message, honest: Honest) -> Message:
        reply = honest()
        reply.content["metrics"] = MetricRecord(metrics)
        return reply

    return fault


def two_records(_: Message, honest: Honest) -> Message:
    reply = honest()
    reply.content["more"] = ArrayRecord({"x": reply.content.array_records["arrays"]["0.bias"]})
    return reply


def garbled(_: Message, honest: Honest) -> Message:
    reply = honest()
    reply.content.array_records["arrays"]["0.bias"].data = b"not an array"
    return reply


LEFT_OUT = {
    "NaN": (with_arrays(lambda state: state | {"0.weight": state["0.weight"] * float("nan")}), "'0.weight' holds NaN"),
    "infinite": (with_arrays(lambda state: state | {"3.bias": state["3.bias"] / 0}), "'3.bias' holds NaN or infinite"),
    "shape": (with_arrays(lambda state: state | {"0.bias": torch.zeros(4)}), "'0.bias' has shape (4,), expected (5,)"),
    "missing": (with_arrays(lambda state: {k: v for k, v in state.items() if k != "3.bias"}), "'3.bias' is missing"),
    "unknown": (with_arrays(lambda state: state | {"x": torch.zeros(1)}), "'x' is not part of the model"),
    "garbled": (garbled, "cannot be read"),
    "records": (two_records, "2 array records"),
    "metrics": (with_metrics({"num-examples": 3, "other": 1.0}), "metrics are not those"),
    "weight": (with_metrics({"loss": 1.0}), "no usable 'num-examples'"),
    "negative": (with_metrics({"num-examples": -3, "loss": 1.0}), "no usable 'num-examples'"),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_a_bad_reply_is_left_out_and_the_round_goes_on(name: str, tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    fault, expected = LEFT_OUT[name]
    wiretap = tapped(tmp_path / "c", FedAvg())
    result = wiretap.start(tiny(faults={(2, 13): fault}), initial, num_rounds=3)
    assert [(event.round, event.who) for event in wiretap.history.events] == [(2, "13")]
    assert expected in wiretap.history.events[0].what
    assert set(result.train_metrics_clientapp) == {1, 2, 3}
    assert all(bool(torch.isfinite(value).all()) for value in result.arrays.to_torch_state_dict().values())
    others = open_capture(tmp_path / "c").observations
    assert {(2, 11), (2, 12), (2, 14), (3, 13)} <= {(seen.round, seen.node) for seen in others}


def test_errors_and_silence_are_events(tiny: Any, initial: ArrayRecord, failing: Any, tmp_path: Path) -> None:
    faults = {
        (1, 11): failing(2, "<class 'ValueError'>:<'boom'>\nTraceback"),
        (1, 12): lambda *_: None,
        (2, 14): failing(6, "guard: no"),
    }
    wiretap = tapped(tmp_path / "c", FedAvg())
    wiretap.start(tiny(faults=faults), initial, num_rounds=2)
    found = [(event.round, event.who, event.what) for event in wiretap.history.events]
    assert found == [
        (1, "11", "error 2: <class 'ValueError'>:<'boom'>"),
        (1, "12", "no reply to the train message"),
        (2, "14", "refused: guard: no"),
    ]
    capture = open_capture(tmp_path / "c")
    assert [seen.node for seen in capture.observations] == [13, 14, 11, 12, 13]


def test_a_federation_in_which_every_site_fails_ends(tiny: Any, initial: ArrayRecord, failing: Any, tmp_path: Path) -> None:
    grid = tiny(faults={(round, node): failing(2, "no") for round in (1, 2) for node in (11, 12, 13, 14)})
    wiretap = tapped(tmp_path / "c", FedAvg())
    result = wiretap.start(grid, initial, num_rounds=2)
    assert same(result.arrays, initial)
    assert len(wiretap.history.events) == 8
    capture = open_capture(tmp_path / "c")
    assert capture.observations == ()
    assert len(capture.models) == 3


def test_no_examples_anywhere_does_not_abort(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    grid = tiny(faults={(1, node): with_metrics({"num-examples": 0, "loss": 1.0}) for node in (11, 12, 13, 14)})
    grid.evaluate_faults = {(1, node): with_metrics({"num-examples": 0, "accuracy": 1.0}) for node in (11, 12, 13, 14)}
    wiretap = tapped(tmp_path / "c", FedAvg())
    result = wiretap.start(grid, initial, num_rounds=2)
    assert set(result.train_metrics_clientapp) == set(result.evaluate_metrics_clientapp) == {2}
    assert all("'num-examples' is 0 in every reply" in event.what for event in wiretap.history.events)
    assert len(open_capture(tmp_path / "c").observations) == 8


def test_one_site_without_examples_counts_as_the_bare_strategy_counts_it(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    faults = {(1, 11): with_metrics({"num-examples": 0, "loss": 1.0})}
    seeded()
    bare = FedAvg().start(tiny(faults=faults), initial, num_rounds=1)
    seeded()
    wiretap = tapped(tmp_path / "c", FedAvg())
    assert same(bare.arrays, wiretap.start(tiny(faults=faults), initial, num_rounds=1).arrays)
    assert wiretap.history.events == []


def test_a_reply_is_mapped_by_the_message_it_answers(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    def anonymous(_: Message, honest: Honest) -> Message:
        reply = honest()
        reply.metadata.__dict__["_src_node_id"] = 1
        return reply

    tapped(tmp_path / "c", FedAvg()).start(tiny(faults={(1, 12): anonymous}), initial, num_rounds=1)
    assert open_capture(tmp_path / "c").nodes == (11, 12, 13, 14)


def killed(folder: Path, honest: Strategy, initial: ArrayRecord, grid: Any, *, round: int) -> None:
    grid.stop_at = round
    with pytest.raises(KeyboardInterrupt):
        tapped(folder / "c", honest, checkpoints=folder / "k").start(grid, initial, num_rounds=4)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("round", [1, 3])
def test_a_killed_federation_resumes_to_the_same_weights(
    name: str, round: int, tiny: Any, initial: ArrayRecord, tmp_path: Path
) -> None:
    seeded()
    whole = tapped(tmp_path / "whole", STRATEGIES[name]()).start(tiny(), initial, num_rounds=4)
    seeded()
    killed(tmp_path, STRATEGIES[name](), initial, tiny(), round=round)
    if round > 1:
        random.seed(99)
    else:
        seeded()
    sink = Sink(tmp_path / "c", granted=CURIOUS, task=TASK, resume=True)
    wiretap = Wiretap(STRATEGIES[name](), sink, checkpoints=tmp_path / "k", resume=True)
    grid = tiny()
    result = wiretap.start(grid, initial, num_rounds=4)
    assert {received[0] for received in grid.received} == set(range(round, 5))
    assert same(whole.arrays, result.arrays)
    assert whole.train_metrics_clientapp == result.train_metrics_clientapp
    assert whole.evaluate_metrics_clientapp == result.evaluate_metrics_clientapp
    first, second = open_capture(tmp_path / "whole"), open_capture(tmp_path / "c")
    assert captured(first) == captured(second)


def captured(capture: Capture) -> list[tuple[Any, ...]]:
    seen = [(one.round, one.node, float(sum(v.double().sum() for v in one.returned.values()))) for one in capture.observations]
    return [*seen, *(float(sum(v.double().sum() for v in one.values())) for one in capture.models)]  # type: ignore[list-item]


def test_what_an_interrupted_round_left_is_removed(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    killed(tmp_path, FedAvg(), initial, tiny(), round=3)
    left = tmp_path / "c" / "round-0003"
    left.mkdir()
    (left / "node-11.safetensors").write_bytes(b"half")
    assert [seen.round for seen in open_capture(tmp_path / "c").observations] == [1] * 4 + [2] * 4
    sink = Sink(tmp_path / "c", granted=CURIOUS, task=TASK, resume=True)
    Wiretap(FedAvg(), sink, checkpoints=tmp_path / "k", resume=True).start(tiny(), initial, num_rounds=2)
    assert not left.exists()
    assert [path.name for path in (tmp_path / "k").iterdir() if path.suffix == ".json"] == ["round-0002.json"]


def test_central_evaluation_is_kept(tiny: Any, initial: ArrayRecord, tmp_path: Path) -> None:
    def evaluate(round: int, _: ArrayRecord) -> MetricRecord:
        return MetricRecord({"round": round})

    grid = tiny()
    grid.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        tapped(tmp_path / "c", FedAvg(), checkpoints=tmp_path / "k").start(grid, initial, num_rounds=4, evaluate_fn=evaluate)
    sink = Sink(tmp_path / "c", granted=CURIOUS, task=TASK, resume=True)
    wiretap = Wiretap(FedAvg(), sink, checkpoints=tmp_path / "k", resume=True)
    result = wiretap.start(tiny(), initial, num_rounds=4, evaluate_fn=evaluate)
    assert {round: metrics["round"] for round, metrics in result.evaluate_metrics_serverapp.items()} == {n: n for n in range(5)}


@pytest.mark.parametrize(
    ("granted", "observations", "models"),
    [
        (NAMED["model-user"], 0, 1),
        (NAMED["sums-only"], 2, 3),
        (CURIOUS, 8, 3),
        (CURIOUS & ~Can.SEE_FINAL & ~Can.SEE_MODELS, 8, 0),
    ],
)
def test_the_threat_model_decides_what_reaches_the_disk(
    granted: Can, observations: int, models: int, tiny: Any, initial: ArrayRecord, tmp_path: Path
) -> None:
    result = Wiretap(FedAvg(), Sink(tmp_path / "c", granted=granted, task=TASK)).start(tiny(), initial, num_rounds=2)
    capture = open_capture(tmp_path / "c")
    assert (len(capture.observations), len(capture.models)) == (observations, models)
    if models:
        assert equal(capture.final, result.arrays.to_torch_state_dict())
    if Can.SEE_UPDATES not in granted:
        assert not list(tmp_path.rglob("node-*"))
        assert all(seen.node is None for seen in capture.observations)
        for seen, after in zip(capture.observations, capture.models[1:], strict=False):
            assert all(torch.allclose(seen.returned[key], after[key], atol=1e-6) for key in parameters(after))
    if not observations:
        assert not list(tmp_path.rglob("sent-*"))
    if models == 1:
        assert [path.name for path in (tmp_path / "c").rglob("*.safetensors")] == ["final.safetensors"]
