"""The opening of SecAgg+ on flpriv's own engines: single updates to the rounding of the protocol, the sum untouched."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv import audit as audits
from flpriv import scenario
from flpriv.attacks.malicious.secagg_opening import SecAggOpening
from flpriv.capture import Capture, Observation
from flpriv.engine import inline, simulation
from flpriv.errors import FlprivError, ScenarioError, ThreatError
from flpriv.scenario import Scenario
from flpriv.secure_aggregation import SecureAggregation, Unmask
from flpriv.state import State
from flpriv.store import open_capture
from flpriv.threat import Can
from flpriv.witness import read_witnesses

SITES = 4
FINE = {"max_weight": 10, "clipping_range": 1.0}


def audit(secure: Any = FINE, *, attack: Mapping[str, Any] | None = None, **tables: Any) -> Scenario:
    """One round of four sites, one step on two images each; the opening followed by ``attack``."""
    federation = {"rounds": 1, "local": {"steps": 1, "batch_size": 2, "lr": 0.1}, "secure_aggregation": secure}
    everything: dict[str, Any] = {
        "name": "opening",
        "seed": 5,
        "sites": {"source": "phantom", "sites": SITES, "patients": 8, "size": 16},
        "federation": federation,
        "threat": {"model": "malicious-server"},
        "attacks": {"opening": {"attack": "secagg-opening", **(attack or {})}} if secure else {},
    }
    return scenario.parse(everything | tables, root=Path.cwd())


def run(folder: Path, which: Scenario, *, engine: Any = inline) -> tuple[Capture, list[str]]:
    """The first setting's capture and what happened in it."""
    engine.run(which, which.settings()[0], folder=folder)
    events = json.loads((folder / "result.json").read_text())["events"]
    return open_capture(folder / "capture"), [str(event["what"]) for event in events]


def furthest(one: State, other: State) -> float:
    return max(float((one[key].double() - other[key].double()).abs().max()) for key in one)


def step(examples: int | None, secure: Mapping[str, Any] = FINE) -> float:
    """What one whole number is worth in a single update."""
    options = SecureAggregation(**secure)
    return 2 * options.clipping_range / options.steps(SITES) * options.max_weight / (examples or 0)


def right(opened: Observation, plain: Observation, secure: Mapping[str, Any] = FINE) -> bool:
    """Whether the update opened is the one really sent, to the rounding of the protocol and of float32."""
    rounding = 2 * torch.finfo(torch.float32).eps * max(float(value.abs().max()) for value in plain.returned.values())
    assert step(opened.examples, secure) < 0.01 * max(float(value.abs().max()) for value in plain.update.values())
    return furthest(opened.returned, plain.returned) <= step(opened.examples, secure) + rounding


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Observation]:
    """What each site sends in the same federation without secure aggregation."""
    folder = tmp_path_factory.mktemp("plain")
    capture, _ = run(folder, audit(False))
    return by_site(folder, capture)


def by_site(folder: Path, capture: Capture) -> dict[str, Observation]:
    sites = {witness.node: witness.site for witness in read_witnesses(folder)}
    return {sites[seen.node]: seen for seen in capture.observations if seen.node is not None}


@pytest.mark.parametrize(
    ("how", "secure"),
    [
        ("both", FINE),
        ("auto", FINE),
        ("auto", {**FINE, "reconstruction_threshold": 2}),
        ("split", {**FINE, "reconstruction_threshold": 2}),
        ("both", {**FINE, "num_shares": 3, "reconstruction_threshold": 2}),
        ("both", {**FINE, "quantization_range": 2**22}),
    ],
)
def test_every_update_is_opened_and_the_sum_is_what_it_was(
    how: str, secure: dict[str, Any], plain: dict[str, Observation], tmp_path: Path
) -> None:
    honest, _ = run(tmp_path / "honest", audit(secure, attacks={}))
    capture, events = run(tmp_path / "opened", audit(secure, attack={"how": how}))
    opened = by_site(tmp_path / "opened", capture)
    assert opened.keys() == plain.keys()
    for site, seen in opened.items():
        assert (seen.opened, seen.trap, seen.examples) == (True, "opening", plain[site].examples)
        assert right(seen, plain[site], secure)
    assert events == []
    for one, other in zip(honest.models, capture.models, strict=True):
        assert furthest(one, other) < 1e-7


def test_only_those_it_is_aimed_at_are_opened(plain: dict[str, Observation], tmp_path: Path) -> None:
    capture, _ = run(tmp_path, audit(threat={"model": "malicious-sums-only", "victims": 1}))
    ((site, seen),) = by_site(tmp_path, capture).items()
    assert right(seen, plain[site])
    assert [one.node is None for one in capture.observations] == [True, False]
    assert Can.SEE_UPDATES not in capture.granted


def test_in_other_rounds_nothing_is_opened(tmp_path: Path) -> None:
    capture, _ = run(tmp_path, audit(threat={"model": "malicious-server", "tamper_rounds": [2]}))
    assert [seen.node for seen in capture.observations] == [None]
    with pytest.raises(FlprivError, match="no update was opened"):
        SecAggOpening()(capture)


@pytest.mark.parametrize(
    ("how", "threshold", "reason"),
    [
        ("both", 3, "4 nodes are named both alive and dropped"),
        ("split", 2, "a threshold of 2 of 4 shares lets the server ask one half of the nodes"),
    ],
)
def test_sites_that_look_at_requests_refuse_and_the_round_has_no_sum(
    how: str, threshold: int, reason: str, tmp_path: Path
) -> None:
    secure = {**FINE, "reconstruction_threshold": threshold}
    which = audit(secure, attack={"how": how}, defenses={"unmask-check": {}}, compare=["unmask-check"])
    capture, events = run(tmp_path, which)
    assert capture.observations == ()
    assert furthest(capture.models[0], capture.models[1]) == 0
    assert len(events) == SITES
    assert all(event.startswith(f"refused: unmask-check: {reason}") for event in events)


def test_split_requests_get_past_a_check_that_sees_no_majority(plain: dict[str, Observation], tmp_path: Path) -> None:
    secure = {**FINE, "reconstruction_threshold": 2}
    checks = {"unmask-check": {"majority": False}}
    which = audit(secure, attack={"how": "split"}, defenses=checks, compare=["unmask-check"])
    capture, events = run(tmp_path, which)
    assert events == []
    assert all(right(seen, plain[site], secure) for site, seen in by_site(tmp_path, capture).items())


@pytest.mark.parametrize("check", [False, True])
def test_a_server_may_announce_a_lower_threshold_and_finer_numbers(
    check: bool, plain: dict[str, Observation], tmp_path: Path
) -> None:
    finer = {"reconstruction_threshold": 0.5, **FINE}
    checks: dict[str, Any] = {"defenses": {"unmask-check": {"majority": False}}, "compare": ["unmask-check"]} if check else {}
    which = audit({"max_weight": 1000}, attack={"how": "split", "announce": finer}, **checks)
    capture, events = run(tmp_path, which)
    if check:
        assert {event.partition(": the")[2] for event in events} == {" server announced threshold = 2, agreed is 3"}
        assert capture.observations == ()
    else:
        assert all(right(seen, plain[site], finer) for site, seen in by_site(tmp_path, capture).items())
        assert len(capture.observations) == 1 + SITES


def test_with_the_check_an_honest_federation_goes_on_as_it_was(tmp_path: Path) -> None:
    honest, _ = run(tmp_path / "bare", audit(attacks={}))
    checked, events = run(tmp_path / "checked", audit(attacks={}, defenses={"unmask-check": {}}, compare=["unmask-check"]))
    assert events == []
    assert furthest(honest.final, checked.final) == 0


def test_a_threshold_above_half_cannot_be_split(tmp_path: Path) -> None:
    capture, events = run(tmp_path, audit(attack={"how": "split"}))
    assert [seen.node for seen in capture.observations] == [None]
    assert events == []


def test_requests_split_evenly_where_many_are_opened() -> None:
    nodes = tuple(range(10))
    honest = {node: Unmask(alive=nodes, dropped=()) for node in nodes}
    trap = SecAggOpening(how="split").trap(_task(), public=None, rng=torch.Generator())
    asked = trap.unmask(honest, round=1, nodes=nodes, threshold=5)
    for node, one in asked.items():
        assert sorted([*one.alive, *one.dropped]) == list(nodes)
        assert node in one.alive
        assert len(one.alive) >= 5
    for node in nodes:
        assert sum(node in one.alive for one in asked.values()) == sum(node in one.dropped for one in asked.values()) == 5


def _task() -> Any:
    from flpriv import data

    return data.task(audit())


def test_with_imprint_the_images_of_each_site_come_back(tmp_path: Path) -> None:
    """The trap in the model travels with that in the protocol; its read-out names the sites."""
    which = audit({"max_weight": 10, "clipping_range": 4.0}, attack={"then": "imprint", "options": {"gain": 1.0}})
    verdict = audits.run(which, out=tmp_path)
    (finding,) = [found for found in verdict.findings if not found.site]
    assert finding.status == "ok"
    assert {found.site for found in verdict.findings if found.site} == {f"hospital-{n}" for n in range(1, SITES + 1)}
    mean = next(metric.value for metric in finding.metrics if metric.name == "mean PSNR")
    assert mean is not None
    assert mean > 30


def test_a_model_of_other_layers_for_some_sites_alone_has_no_sum(tmp_path: Path) -> None:
    threat = {"model": "malicious-server", "victims": 1}
    capture, events = run(tmp_path, audit(attack={"then": "imprint"}, threat=threat))
    assert capture.observations == ()
    (what,) = set(events)
    assert "no sum: nodes were sent models of different layers" in what


def test_attacks_on_single_updates_are_not_granted(tmp_path: Path) -> None:
    which = audit(attacks={"update-cosine": {}, "inverting-gradients": {"iterations": 1}})
    verdict = audits.run(which, out=tmp_path)
    assert {finding.attack: finding.status for finding in verdict.findings} == {
        "update-cosine": "not granted",
        "inverting-gradients": "not granted",
    }
    (caveat,) = verdict.caveats
    assert "Secure aggregation hides single updates: 'malicious-server' saw only sums here" in caveat


def test_a_report_says_where_masks_can_be_guessed(tmp_path: Path) -> None:
    which = audit({**FINE, "num_shares": 3, "reconstruction_threshold": 2}, attacks={"loss-threshold": {}})
    verdict = audits.run(which, out=tmp_path)
    assert any("Flower draws them from 28 bits" in caveat for caveat in verdict.caveats)


def test_it_needs_a_federation_with_secure_aggregation() -> None:
    which = audit(False, attacks={"opening": {"attack": "secagg-opening"}})
    with pytest.raises(ScenarioError, match=r"attacks\.opening: 'secagg-opening' attacks secure aggregation; set federation"):
        audits.check(which)
    audits.check(audit())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"then": "update-cosine"}, "must be another attack that rebuilds images"),
        ({"then": "secagg-opening"}, "must be another attack that rebuilds images"),
        ({"announce": {"threshold": 2}}, "announce: unknown option 'threshold'"),
        ({"then": "imprnt"}, "did you mean 'imprint'"),
        ({"then": "imprint", "options": {"bin": 3}}, "unknown option 'bin'"),
    ],
)
def test_a_wrong_attack_to_go_on_with_is_told_before_anything_runs(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        audits.check(audit(attack=options))


def test_what_the_other_attack_needs_must_be_granted(tmp_path: Path) -> None:
    capture, _ = run(tmp_path, audit())
    with pytest.raises(ThreatError, match="secagg-opening needs 'know-local, tamper'"):
        SecAggOpening()(Capture(granted=Can.SEE_MODELS, task=capture.task, observations=capture.observations))


@pytest.mark.slow
def test_on_flowers_simulation_it_opens_the_same_and_the_check_refuses(plain: dict[str, Observation], tmp_path: Path) -> None:
    here, _ = run(tmp_path / "inline", audit())
    there, events = run(tmp_path / "simulation", audit(), engine=simulation)
    assert events == []
    opened = by_site(tmp_path / "simulation", there)
    assert opened.keys() == plain.keys()
    assert all(right(seen, plain[site]) for site, seen in opened.items())
    assert furthest(here.final, there.final) < 1e-6
    which = audit(defenses={"unmask-check": {}}, compare=["unmask-check"])
    capture, events = run(tmp_path / "checked", which, engine=simulation)
    assert capture.observations == ()
    assert len(events) == SITES
    assert all(event.startswith("refused: unmask-check: 4 nodes are named both alive and dropped") for event in events)
