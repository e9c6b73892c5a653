"""Whole audits with a malicious operator: sums over sites, single victims, rounds in turn, and what armed sites would notice."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv import audit, scenario
from flpriv.attacks.membership.gradient_ascent import GradientAscent
from flpriv.errors import FlprivError
from flpriv.finding import Finding, Verdict
from flpriv.store import open_capture

TABLES: dict[str, Any] = {
    "name": "malicious",
    "seed": 2,
    "sites": {"source": "phantom", "sites": 3, "patients": 20, "size": 24},
    "federation": {"rounds": 1, "local": {"lr": 0.05, "batch_size": 6, "steps": 1}},
    "threat": {"model": "malicious-sums-only"},
    "attacks": {"crossed-imprint": {"bins": 90}},
    "compare": ["none"],
}


def run(folder: Path, **changes: Any) -> Verdict:
    return audit.run(scenario.parse({**TABLES, **changes}, root=folder), out=folder / "run")


def found(verdict: Verdict) -> Finding:
    """The finding over all sites."""
    return next(finding for finding in verdict.findings if not finding.site)


def recovered(verdict: Verdict) -> float:
    headline = found(verdict).headline
    assert headline is not None and headline.value is not None and headline.name == "fraction at PSNR ≥ 30 dB"
    return headline.value


def test_a_sum_over_sites_gives_their_images_away(tmp_path: Path) -> None:
    verdict = run(tmp_path)
    assert recovered(verdict) == 1 and len(found(verdict).pairs) == 16
    (seen,) = open_capture(tmp_path / "run" / "settings" / "none--crossed-imprint" / "capture").observations
    assert seen.node is None and len(seen.nodes) == 3 and seen.trap == "crossed-imprint"
    assert not list(tmp_path.rglob("node-*.safetensors"))


def test_images_are_attributed_to_sites_behind_a_sum(tmp_path: Path) -> None:
    verdict = run(tmp_path, attacks={"crossed-imprint": {"bins": 90, "clients": 3}})
    by_site = {finding.site: finding.headline.value for finding in verdict.findings if finding.site and finding.headline}
    assert len(by_site) == 3 and set(by_site.values()) == {1.0}


def test_one_victim_in_every_second_round(tmp_path: Path) -> None:
    verdict = run(
        tmp_path,
        federation={"rounds": 4, "local": {"lr": 0.05, "batch_size": 6, "steps": 2}},
        threat={"model": "malicious-server", "tamper_rounds": [2, 4], "victims": 1},
        attacks={"crossed-imprint": {"bins": 240, "rounds": []}},
    )
    assert recovered(verdict) == 1
    seen = open_capture(tmp_path / "run" / "settings" / "none--crossed-imprint" / "capture").observations
    armed = [one for one in seen if one.trap]
    assert len(seen) == 12 and [one.round for one in armed] == [2, 4] and len({one.node for one in armed}) == 1


def test_what_armed_sites_would_notice(tmp_path: Path) -> None:
    """A block that adds a little brightness changes hardly anything; one that takes the image's place leaves chance."""
    federation = {"rounds": 2, "local": {"lr": 0.05, "batch_size": 8, "steps": 4}}
    threat = {"model": "malicious-server", "tamper_rounds": [2]}
    attacks = {
        "quiet": {"attack": "crossed-imprint", "bins": 60, "strength": 0.01, "rounds": []},
        "loud": {"attack": "imprint", "bins": 60, "connection": "linear", "rounds": []},
    }
    verdict = run(tmp_path, federation=federation, threat=threat, attacks=attacks)
    quiet, loud = (
        next(m for s in verdict.settings if s.trap == trap for m in s.armed_utility if m.name == "AUROC") for trap in attacks
    )
    assert quiet.null_name == "honest model" and quiet.null is not None
    assert quiet.value == pytest.approx(quiet.null, abs=0.05)
    assert loud.null == quiet.null and loud.value != pytest.approx(loud.null, abs=0.05)


def test_a_trap_for_candidates_is_sent_for_those_of_the_capture(tmp_path: Path) -> None:
    verdict = run(
        tmp_path,
        federation={"rounds": 3, "local": {"lr": 0.05, "batch_size": 6, "epochs": 2}},
        threat={"model": "malicious-sums-only", "tamper_rounds": [2, 3]},
        attacks={"gradient-ascent": {"gamma": 0.2, "groups": 2}},
    )
    finding = found(verdict)
    assert finding.status == "ok" and finding.headline is not None and finding.headline.name == "AUC"
    assert next(s.armed_utility for s in verdict.settings if s.trap)
    capture = open_capture(tmp_path / "run" / "settings" / "none--gradient-ascent" / "capture")
    assert [one.trap for one in capture.observations] == ["", "gradient-ascent", "gradient-ascent"]
    assert capture.candidates is not None
    own = GradientAscent(gamma=0.2, groups=2).aim(capture.task, public=None, candidates=capture.candidates, rng=torch.Generator())
    for seen in capture.observations[1:]:
        sent = own.arm(capture.models[seen.round - 1], round=seen.round, node=seen.nodes[0], nodes=seen.nodes)
        assert sent is not None and all(torch.allclose(sent[key], value, atol=1e-6) for key, value in seen.sent.items())


def test_a_trap_for_candidates_needs_them(tmp_path: Path) -> None:
    with pytest.raises(FlprivError, match="grant 'know-candidates'"):
        run(tmp_path, threat={"model": "malicious-server", "deny": ["know-candidates"]}, attacks={"gradient-ascent": {}})


@pytest.mark.slow
def test_the_same_on_the_simulation_runtime(tmp_path: Path) -> None:
    assert recovered(run(tmp_path, engine="simulation")) == 1
