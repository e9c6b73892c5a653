"""The one-run audit: what it plants, what it scores, and what a whole audit says of defences that keep their word or do not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from flpriv import audit
from flpriv.attacks.privacy_audit.gradients import along, craft, flat, gradients
from flpriv.canary import Canaries, direction
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, PrivacyBound
from flpriv.errors import CaptureError, ScenarioError, ThreatError
from flpriv.finding import Finding, Level, Verdict
from flpriv.records import Records
from flpriv.registry import create
from flpriv.scenario import parse
from flpriv.state import add
from flpriv.task import Task
from flpriv.testing import blindfold, glass, score
from flpriv.threat import Can

TASK = Task(modality="xray", shape=(1, 12, 12), classes=("a", "b", "c"), model="cnn", options={"width": 4})
ALL = Can.SEE_FINAL | Can.SEE_MODELS | Can.SEE_UPDATES


def public(count: int = 6) -> Records:
    rng = torch.Generator().manual_seed(3)
    return Records(images=torch.rand(count, 1, 12, 12, generator=rng), labels=torch.arange(count) % 3)


def brought(images: Records | None = None, **options: Any) -> Canaries:
    attack = create("attacks", "one-run-audit", options)
    rng = torch.Generator().manual_seed(1)
    found: Canaries = attack.canaries(TASK, model=TASK.build(seed=5), public=images, rng=rng)
    return found


def test_gradients_need_no_images() -> None:
    found = brought(count=30, norm=0.5)
    assert found.seeds is not None
    assert (len(found), len(set(found.seeds.tolist())), found.norm, found.records) == (30, 30, 0.5, None)


@pytest.mark.parametrize(("kind", "wrong"), [("natural", False), ("mislabelled", True)])
def test_records_are_public_images_and_then_copies_that_differ(kind: str, wrong: bool) -> None:
    own = public()
    found = brought(own, kind=kind, count=15).records
    assert found is not None
    assert len({tuple(image.flatten().tolist()) for image in found.images}) == 15
    rows = [int((own.images == image).flatten(1).all(1).nonzero()) for image in found.images[:6]]
    assert sorted(rows) == list(range(6))
    assert ((found.labels[:6] != own.labels[rows]) == wrong).all()
    sorted_pixels = own.images.flatten(1).sort(1).values
    assert all((sorted_pixels == image.flatten().sort().values).all(1).any() for image in found.images[6:])


def test_crafted_records_stand_across_public_ones() -> None:
    own, model = public(24), TASK.build(seed=5).eval()
    start = Records(images=own.images[:6], labels=(own.labels[:6] + 1) % 3)
    made = craft(model, start, own, norm=1.0, steps=25)
    assert made.images.min() >= 0
    assert made.images.max() <= 1
    others = functional.normalize(gradients(model, own.images, own.labels).detach(), dim=1)

    def across(records: Records) -> float:
        rows = functional.normalize(gradients(model, records.images, records.labels).detach(), dim=1)
        return float((rows @ others.T).square().mean())

    assert across(made) < 0.7 * across(start)


def test_record_kinds_say_what_they_need() -> None:
    with pytest.raises(ScenarioError, match=r"sites\.split\.public"):
        brought(None, kind="natural")
    one = replace(TASK, classes=("a",))
    with pytest.raises(ScenarioError, match="second class"):
        create("attacks", "one-run-audit", {"kind": "mislabelled"}).canaries(
            one, model=one.build(), public=public(), rng=torch.Generator()
        )


def test_gradients_of_records_are_autograds() -> None:
    model, own = TASK.build(seed=2).eval(), public(5)
    rows = gradients(model, own.images, own.labels)
    for image, label, row in zip(own.images, own.labels, rows, strict=True):
        model.zero_grad()
        torch.autograd.backward(functional.cross_entropy(model(image[None]), label[None]))
        expected = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
        assert torch.allclose(row, expected, atol=1e-6)
    update = -rows[2].detach() * 3
    found = along(model, own, update, chunk=2)
    assert int(found.argmax()) == 2
    assert float(found[2]) == pytest.approx(float(update.norm()), rel=1e-5)


def seen(node: int | None, update: torch.Tensor, *, round: int = 1) -> Observation:
    state = TASK.build(seed=1).state_dict()
    parts = torch.split(update, [value.numel() for value in state.values()])
    returned = add(state, {key: part.view_as(state[key]) for key, part in zip(state, parts, strict=True)})
    return Observation(round=round, node=node, sent=state, returned=returned)


def test_scores_are_lengths_along_directions_of_the_node_that_planted_them() -> None:
    canaries = brought(count=12)
    assert canaries.seeds is not None
    state = TASK.build(seed=1).state_dict()
    lines = [direction(one, state) for one in canaries.seeds.tolist()]
    update = torch.zeros_like(flat(state))
    update[lines[4][0]] -= 0.3 * lines[4][1]
    observations = (seen(7, update), seen(7, update, round=2), seen(8, torch.randn_like(update)))
    capture = Capture(granted=ALL, task=TASK, observations=observations, models=(state,), canaries=replace(canaries, nodes=(7,)))
    (claim,) = create("attacks", "one-run-audit", {})(capture)
    assert isinstance(claim, PrivacyBound)
    assert float(claim.scores[4]) == pytest.approx(0.6, rel=1e-3)
    expected = torch.stack([-2 * (update[places] @ entries) for places, entries in lines]).double()
    assert torch.allclose(claim.scores, expected, atol=1e-4)
    summed = replace(capture, observations=(seen(None, update), seen(None, update, round=2)))
    (same,) = create("attacks", "one-run-audit", {})(summed)
    assert torch.allclose(same.scores, expected, atol=1e-4)
    final = add(state, summed.observations[0].update)
    (models,) = create("attacks", "one-run-audit", {})(replace(capture, observations=(), models=(state, final)))
    assert torch.allclose(models.scores, expected / 2, atol=1e-4)


def test_a_capture_without_canaries_or_models_is_refused() -> None:
    attack = create("attacks", "one-run-audit", {})
    with pytest.raises(CaptureError, match="no canaries"):
        attack(Capture(granted=ALL, task=TASK))
    with pytest.raises(ThreatError, match="see-final"):
        attack(Capture(granted=Can(0), task=TASK, canaries=brought(count=12)))


@pytest.mark.parametrize(
    ("options", "least"),
    [
        ({"count": 100}, 2.5),
        ({"kind": "mislabelled", "count": 48}, 1.0),
        ({"kind": "mislabelled", "count": 48, "score": "update"}, 1.0),
        ({"kind": "crafted", "count": 48}, 0.5),
    ],
)
def test_a_federation_that_knows_its_records_by_heart_is_found_out(options: Mapping[str, Any], least: float) -> None:
    attack = create("attacks", "one-run-audit", options)
    made = glass(Goal.PRIVACY_BOUND, attack=attack)
    assert score(attack(made.capture), made.truth) > least
    assert score(attack(blindfold(made.capture)), made.truth) == 0


def whole(tmp_path: Path, **tables: Any) -> Verdict:
    scenario = parse(
        {
            "seed": 1,
            "plugins": [str(Path(__file__).parents[3] / "examples" / "broken_dp.py")],
            "sites": {"source": "phantom", "sites": 2, "size": 16, "patients": 60},
            "model": {"name": "cnn", "width": 16},
            "federation": {"rounds": 3, "local": {"lr": 0.05, "batch_size": 16}},
            **tables,
        },
        root=tmp_path,
    )
    return audit.run(scenario, out=tmp_path / "out")


def named(verdict: Verdict, defense: str) -> Finding:
    (found,) = [finding for finding in verdict.findings if finding.defense == defense]
    assert found.status == "ok", found.message
    return found


def test_an_audit_finds_the_defence_whose_noise_is_a_tenth_of_what_it_claims(tmp_path: Path) -> None:
    verdict = whole(
        tmp_path,
        attacks={"one-run-audit": {}},
        defenses={"dp-sgd": {"noise_multiplier": 3.0}, "broken-dp": {"noise_multiplier": 3.0}},
    )
    plain, kept, broken = (named(verdict, defense) for defense in ("none", "dp-sgd", "broken-dp"))
    for finding in (kept, broken):
        assert finding.headline is not None
        assert finding.headline.null == pytest.approx(verdict.settings[1].epsilon["hospital-1"], rel=0.2)
        assert (finding.headline.null or 9) < 4
    assert plain.headline is not None
    assert (plain.headline.value or 0) > 3
    assert kept.headline is not None
    assert (kept.headline.value or 0) < (kept.headline.null or 0)
    assert kept.level <= Level.LOW
    assert broken.level is Level.CRITICAL
    assert any("claims is wrong" in caveat and "broken-dp" in caveat for caveat in verdict.caveats)
    assert [setting.id for setting in verdict.settings] == [f"{d}--one-run-audit" for d in ("none", "dp-sgd", "broken-dp")]


def test_records_are_planted_at_the_site_the_scenario_names(tmp_path: Path) -> None:
    verdict = whole(
        tmp_path,
        attacks={"mislabelled": {"attack": "one-run-audit", "kind": "mislabelled", "count": 40}},
        threat={"model": "honest-but-curious", "grant": ["know-labels", "know-order"], "canary_site": "hospital-2"},
    )
    assert named(verdict, "none").headline is not None
    notes = {
        place: (
            tmp_path / "out" / "settings" / "none--mislabelled" / "witness" / f"site-{place:04d}" / "round-0001.json"
        ).read_text()
        for place in (0, 1)
    }
    assert "canary-00" not in notes[0]
    assert 10 <= len(set(notes[1].split("canary-"))) - 1 <= 30
    with pytest.raises(ScenarioError, match="canary_site = 'hospital-9'"):
        whole(tmp_path / "no", attacks={"one-run-audit": {}}, threat={"canary_site": "hospital-9"})


def test_sites_that_are_canaries_pass_the_defences_of_updates(tmp_path: Path) -> None:
    verdict = whole(
        tmp_path,
        attacks={"sites": {"attack": "one-run-audit", "level": "site", "count": 60}},
        defenses={
            "gaussian": {"noise_multiplier": 8.0, "formal": True},
            "clip": {"defense": "gaussian", "noise_multiplier": 0.0},
        },
    )
    plain, noised, clipped = (named(verdict, defense) for defense in ("none", "gaussian", "clip"))
    for finding in (plain, clipped):
        assert finding.headline is not None
        assert (finding.headline.value or 0) > 2
        assert finding.headline.null is None
    assert noised.headline is not None
    assert noised.headline.null == pytest.approx(verdict.settings[1].epsilon["hospital-1"])
    assert (noised.headline.value or 0) < (noised.headline.null or 0)
    assert set(verdict.settings[1].epsilon) == {"hospital-1", "hospital-2"}
    assert not verdict.settings[0].events
    with pytest.raises(ScenarioError, match="plants no records"):
        create("attacks", "one-run-audit", {"level": "site", "kind": "natural"})


def test_a_sites_own_updates_alone_tell_of_it() -> None:
    canaries = Canaries(seeds=torch.tensor([11, 12, 13]), level="site", nodes=(7, 8, 9))
    assert canaries.seeds is not None
    state = TASK.build(seed=1).state_dict()
    lines = [direction(one, state) for one in canaries.seeds.tolist()]
    update = torch.zeros_like(flat(state))
    update[lines[1][0]] += 0.4 * lines[1][1]
    capture = Capture(
        granted=ALL, task=TASK, observations=(seen(8, update), seen(5, -update * 9)), models=(state,), canaries=canaries
    )
    (claim,) = create("attacks", "one-run-audit", {})(capture)
    assert claim.scores.tolist() == pytest.approx([0, 0.4, 0], abs=1e-4)


def test_records_are_scored_under_the_last_model_of_their_site_where_it_is_seen() -> None:
    records = public()
    state, rng = TASK.build(seed=1).state_dict(), torch.Generator().manual_seed(4)
    updates = [0.1 * torch.randn(flat(state).shape, generator=rng) for _ in range(3)]
    observations = (seen(7, updates[0]), seen(7, updates[1], round=2), seen(8, updates[2], round=2))
    canaries = Canaries(records=records, nodes=(7,))
    capture = Capture(granted=ALL, task=TASK, observations=observations, models=(state,), canaries=canaries)
    for given, scored in ((capture, observations[1].returned), (replace(capture, observations=()), state)):
        (claim,) = create("attacks", "one-run-audit", {"kind": "natural"})(given)
        model = TASK.build()
        model.load_state_dict(dict(scored))
        expected = -functional.cross_entropy(model.eval()(records.images).detach(), records.labels, reduction="none")
        assert torch.allclose(claim.scores.float(), expected, atol=1e-5)
