"""Training over SecAgg+ on the inline engine: what is summed, what the server sees, who may drop out, who is refused."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Context, Error, Message, MessageType, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.serverapp.strategy import FedAvg, FedMedian

from flpriv import audit as audits
from flpriv import data, scenario
from flpriv.capture import Capture, Observation
from flpriv.clients.app import app as client
from flpriv.engine import inline
from flpriv.engine.config import RunConfig
from flpriv.errors import RunError, ScenarioError
from flpriv.scenario import Scenario
from flpriv.secure_aggregation import CONFIGS, MODULUS, SecureAggregation
from flpriv.state import State
from flpriv.store import open_capture
from flpriv.strategies.secure_aggregation import SecureGrid, check_strategy
from flpriv.strategies.server import app as server
from flpriv.sums import sums
from flpriv.witness import read_witnesses

SITES = 4
FEDERATION: Mapping[str, Any] = {"rounds": 1, "local": {"steps": 1, "batch_size": 2, "lr": 0.1}}
OPTIONS = {"max_weight": 20}
App = Callable[[Message, Context], Message]


def audit(secure: Any = OPTIONS, *, sites: int = SITES, **tables: Any) -> Scenario:
    federation = {**FEDERATION, "secure_aggregation": secure, **tables.pop("federation", {})}
    source = {"source": "phantom", "sites": sites, "patients": 8, "size": 16}
    return scenario.parse({"name": "sums", "seed": 5, "sites": source, "federation": federation, **tables}, root=Path.cwd())


def run(folder: Path, which: Scenario, *, app: Any = client, resume: bool = False) -> dict[str, Any]:
    """Run the first setting inline; its ``result.json``."""
    folder.mkdir(exist_ok=True)
    config = RunConfig(scenario=which, setting=which.settings()[0], out=folder, resume=resume).to_dict()
    inline.run_apps(app, server, nodes=len(data.sites(which)), run_config=config, seed=which.seed)
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def capture(folder: Path) -> Capture:
    return open_capture(folder / "capture")


def step(options: Mapping[str, Any], *, nodes: int, examples: int) -> float:
    """What one whole number is worth in a sum over so many examples."""
    secure = SecureAggregation(**options)
    return 2 * secure.clipping_range / secure.steps(nodes) * secure.max_weight / examples


def furthest(one: State, other: State) -> float:
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def stage(message: Message) -> str:
    records = message.content.config_records
    return str(records[CONFIGS]["stage"]) if CONFIGS in records else message.metadata.message_type


def failing(what: str, places: tuple[int, ...]) -> App:
    """The client app, but sites at ``places`` answer the messages of a stage with an error."""

    def answer(message: Message, context: Context) -> Message:
        if context.node_config["partition-id"] in places and message.has_content() and stage(message) == what:
            return Message(Error(2, "no power"), reply_to=message)
        return client(message, context)

    return answer


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Observation, ...]:
    """What every site sent in the same federation without secure aggregation."""
    folder = tmp_path_factory.mktemp("plain")
    run(folder, audit(False))
    return capture(folder).observations


def test_the_sum_is_that_of_the_updates_and_nothing_else_is_seen(plain: tuple[Observation, ...], tmp_path: Path) -> None:
    which = audit(threat={"model": "malicious-server"})
    result = run(tmp_path, which)
    found = capture(tmp_path)
    (seen,) = found.observations
    (expected,) = sums(plain)
    assert (seen.node, seen.examples, seen.trap, seen.opened) == (None, expected.examples, "", False)
    assert seen.examples is not None
    assert furthest(seen.returned, expected.returned) < SITES * step(OPTIONS, nodes=SITES, examples=seen.examples) + 1e-6
    assert furthest(found.models[1], expected.returned) < SITES * step(OPTIONS, nodes=SITES, examples=seen.examples) + 1e-6
    assert list((tmp_path / "capture").glob("round-*/node-*")) == []
    assert result["events"] == []
    assert result["rounds"][0]["train"]["loss"] > 0
    assert result["rounds"][0]["evaluate"]["accuracy"] >= 0
    assert {w.node for w in read_witnesses(tmp_path)} == {one.node for one in plain}


def test_a_site_sends_whole_numbers_that_look_drawn_at_random(plain: tuple[Observation, ...], tmp_path: Path) -> None:
    replies: list[Message] = []

    def listening(message: Message, context: Context) -> Message:
        asked = stage(message) if message.has_content() else ""
        reply = client(message, context)
        if asked == "collect_masked_vectors":
            replies.append(reply)
        return reply

    run(tmp_path, audit(), app=listening)
    assert len(replies) == SITES
    secure, updates = SecureAggregation(**OPTIONS), {one.node: one for one in plain}
    for reply in replies:
        assert all(len(record) == 0 for record in reply.content.array_records.values())
        content = reply.content.config_records[CONFIGS]["masked_params"]
        assert isinstance(content, list)
        _, masked = (bytes_to_ndarray(part) for part in content if isinstance(part, bytes))
        assert np.issubdtype(masked.dtype, np.integer)
        assert masked.min() >= 0
        assert masked.max() < MODULUS
        deviation = MODULUS / math.sqrt(12 * len(masked))
        assert abs(masked.mean() - MODULUS / 2) < 5 * deviation
        update = updates[reply.metadata.src_node_id]
        bare = np.concatenate(
            [(update.returned[k] - update.sent[k]).flatten() for k in update.sent if update.sent[k].is_floating_point()]
        )
        whole = bare * (update.examples or 0) / secure.max_weight * secure.steps(SITES) / (2 * secure.clipping_range)
        assert abs(np.corrcoef(masked, whole)[0, 1]) < 5 / math.sqrt(len(masked))


@pytest.mark.parametrize(
    ("what", "secure"),
    [
        ("setup", OPTIONS),
        ("share_keys", OPTIONS),
        ("collect_masked_vectors", OPTIONS),
        ("collect_masked_vectors", {"num_shares": 3, "reconstruction_threshold": 2, "max_weight": 20}),
    ],
)
def test_a_site_that_drops_out_is_left_out_of_the_sum(what: str, secure: dict[str, Any], tmp_path: Path) -> None:
    """And sites that look at what they are asked to unmask find nothing wrong."""
    sites, checked = 5, {"defenses": {"unmask-check": {}}, "compare": ["unmask-check"]}
    run(tmp_path / "plain", audit(False, sites=sites))
    result = run(tmp_path / "sum", audit(secure, sites=sites, **checked), app=failing(what, (1,)))
    witnesses = {w.site: w.node for w in read_witnesses(tmp_path / "plain")}
    gone = witnesses["hospital-2"]
    (expected,) = sums([one for one in capture(tmp_path / "plain").observations if one.node != gone])
    (seen,) = capture(tmp_path / "sum").observations
    assert seen.examples == expected.examples is not None
    assert furthest(seen.returned, expected.returned) < sites * step(secure, nodes=sites, examples=seen.examples or 1) + 1e-6
    assert result["events"] == [{"round": 1, "who": str(gone), "what": "error 2: no power"}]


def test_a_site_that_does_not_help_to_unmask_still_counts(plain: tuple[Observation, ...], tmp_path: Path) -> None:
    result = run(tmp_path, audit(), app=failing("unmask", (2,)))
    (seen,), (expected,) = capture(tmp_path).observations, sums(plain)
    assert seen.examples == expected.examples
    assert furthest(seen.returned, expected.returned) < 1e-4
    assert [event["what"] for event in result["events"]] == ["error 2: no power"]


@pytest.mark.parametrize("what", ["setup", "share_keys", "collect_masked_vectors", "unmask"])
def test_where_too_few_are_left_the_round_ends_without_a_sum_and_the_next_goes_on(what: str, tmp_path: Path) -> None:
    def answer(message: Message, context: Context) -> Message:
        first = message.has_content() and message.content.config_records["config"]["server-round"] == 1
        return (failing(what, (0, 1)) if first else client)(message, context)

    result = run(tmp_path, audit(federation={"rounds": 2}), app=answer)
    found = capture(tmp_path)
    assert [seen.round for seen in found.observations] == [2]
    assert furthest(found.models[0], found.models[1]) == 0 < furthest(found.models[1], found.models[2])
    whats = [event["what"] for event in result["events"]]
    assert [event["round"] for event in result["events"]] == [1] * SITES
    assert whats.count("error 2: no power") == 2
    others = [what for what in whats if what != "error 2: no power"]
    assert all("secure aggregation: no sum: 2 of 4 nodes" in what and what.endswith("are needed") for what in others)


def _spoilt(what: str, key: str, value: Any) -> App:
    """The client app, but the second site's reply of one stage holds something else."""

    def answer(message: Message, context: Context) -> Message:
        asked = stage(message) if message.has_content() else ""
        reply = client(message, context)
        if asked == what and context.node_config["partition-id"] == 1:
            reply.content.config_records[CONFIGS][key] = value
        return reply

    return answer


@pytest.mark.parametrize(
    ("what", "key", "value", "event"),
    [
        ("setup", "pk1", b"no key", "error 2: round 1: ValueError; see the site's own log"),
        ("share_keys", "ctxts", [b"x", b"y", b"z"], "error 2:"),
        ("collect_masked_vectors", "masked_params", [b"no array"], "error 2: no masked update of"),
        ("unmask", "shares", [b"too few"], "error 2: 1 shares, asked for 4"),
        ("unmask", "shares", [b"0123456789abcdefghij"] * 4, "no sum: the shares that came are not of one secret"),
    ],
)
def test_a_site_that_answers_nonsense_does_not_end_the_run(what: str, key: str, value: Any, event: str, tmp_path: Path) -> None:
    result = run(tmp_path, audit(), app=_spoilt(what, key, value))
    assert result["events"]
    assert any(event in one["what"] for one in result["events"])
    assert all(torch.isfinite(value).all() for value in capture(tmp_path).final.values())


def test_too_many_examples_for_the_numbers_end_the_round_with_the_way_out(tmp_path: Path) -> None:
    result = run(tmp_path, audit({"max_weight": 0.1, "clipping_range": 100.0}))
    (what,) = {event["what"] for event in result["events"]}
    assert what.startswith(
        "error 2: secure aggregation: no sum: the weights do not add up; the sites together must have examples"
    )
    assert what.endswith("fewer than 64 times max_weight = 0.1")


@pytest.mark.parametrize("strategy", ["FedProx", "FedAvgM", "FedAdam", "FedAdagrad", "FedYogi"])
def test_strategies_that_need_the_mean_alone_end_where_they_would(strategy: str, tmp_path: Path) -> None:
    ends = []
    for name, secure in (("plain", False), ("sum", {"max_weight": 10})):
        options = {"proximal_mu": 1.0} if strategy == "FedProx" else {}
        options |= {"tau": 0.1, "eta": 0.01} if strategy in ("FedAdam", "FedAdagrad", "FedYogi") else {}
        run(tmp_path / name, audit(secure, federation={"rounds": 2, "strategy": strategy, "options": options}))
        ends.append(capture(tmp_path / name).final)
    assert furthest(*ends) < 2e-4


@pytest.mark.parametrize("strategy", ["Krum", "MultiKrum", "Bulyan", "FedMedian", "FedTrimmedAvg", "QFedAvg"])
def test_strategies_that_look_at_single_replies_are_refused_by_name(strategy: str) -> None:
    options = {"QFedAvg": {"client_learning_rate": 0.1}, "Bulyan": {"num_malicious_nodes": 0}}.get(strategy, {})
    federation = {"strategy": strategy, "options": options}
    audits.check(audit(False, federation=federation))
    with pytest.raises(ScenarioError, match=f"'{strategy}' looks at single replies, which secure aggregation hides; use FedAvg"):
        audits.check(audit(federation=federation))


def test_a_strategy_of_ones_own_may_say_that_it_takes_sums() -> None:
    class Mine(FedMedian):
        takes_sums = True

    class Inherits(FedAvg):
        pass

    check_strategy(Mine(), "Mine")
    check_strategy(Inherits(), "Inherits")
    with pytest.raises(ScenarioError, match="weighted_by_key = 'age'"):
        check_strategy(FedAvg(weighted_by_key="age"), "FedAvg")


def test_running_statistics_are_averaged_and_counters_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "normed.py").write_text(
        "from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, Sequential\n\n"
        "def net():\n    return Sequential(Conv2d(1, 3, 3), BatchNorm2d(3), Flatten(), Linear(3 * 14 * 14, 2))\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    for name, secure in (("plain", False), ("sum", OPTIONS)):
        run(tmp_path / name, audit(secure, model={"name": "normed:net"}))
    task = data.task(audit(model={"name": "normed:net"}))
    plain, found = (open_capture(tmp_path / name / "capture", task=task).observations for name in ("plain", "sum"))
    (expected,), (seen,) = sums(plain), found
    floating = {key: value for key, value in expected.returned.items() if value.is_floating_point()}
    counters = [key for key in expected.returned if key not in floating]
    assert any(key.endswith("running_var") for key in floating)
    assert furthest(floating, seen.returned) < 1e-4
    assert counters
    assert all(torch.equal(seen.returned[key], seen.sent[key]) for key in counters)


def test_a_killed_run_resumes_to_the_same_weights(tmp_path: Path) -> None:
    which = audit(federation={"rounds": 3, "strategy": "FedAdam", "options": {"fraction_train": 0.8}})
    run(tmp_path / "whole", which)

    def dying(message: Message, context: Context) -> Message:
        if message.has_content() and stage(message) == "unmask" and message.content.config_records["config"]["server-round"] == 2:
            raise KeyboardInterrupt
        return client(message, context)

    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", which, app=dying)
    run(tmp_path / "killed", which, resume=True)
    assert (tmp_path / "whole" / "final.safetensors").read_bytes() == (tmp_path / "killed" / "final.safetensors").read_bytes()
    assert [seen.round for seen in capture(tmp_path / "killed").observations] == [1, 2, 3]


def test_defences_touch_the_update_before_it_is_masked(plain: tuple[Observation, ...], tmp_path: Path) -> None:
    which = audit(defenses={"clip": {"defense": "gaussian", "noise_multiplier": 0.0, "max_grad_norm": 1e-3}}, compare=["clip"])
    run(tmp_path, which)
    (seen,) = capture(tmp_path).observations
    size = math.sqrt(sum(float(value.double().square().sum()) for value in seen.update.values()))
    assert 0 < size < 1.1e-3


def test_training_messages_that_nothing_would_mask_are_not_pushed(tiny: Any) -> None:
    grid = SecureGrid(tiny(), SecureAggregation())
    with pytest.raises(RunError, match="send_and_receive"):
        grid.push_messages([Message(RecordDict(), 11, MessageType.TRAIN)])
