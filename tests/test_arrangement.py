"""Who trains on whose records: centralised, siloed, dealt out, untrained, on both engines."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv import audit, data
from flpriv.arrangement import Arrangement, arrange, arrangement_of
from flpriv.engine import inline, simulation
from flpriv.errors import ScenarioError
from flpriv.knowledge import gather, labels, truth
from flpriv.runfolder import RunFolder
from flpriv.scenario import Scenario, parse
from flpriv.site import Entry, Site
from flpriv.store import finished_rounds, open_capture
from flpriv.testing.plugins import same
from flpriv.witness import read_witnesses

TABLES: dict[str, Any] = {
    "seed": 4,
    "compare": ["none", "centralised", "siloed", "iid", "untrained"],
    "sites": {"source": "phantom", "sites": 3, "patients": 12, "size": 16, "split": {"test": 0.25, "public": 0.0}},
    "federation": {"rounds": 2, "local": {"batch_size": 8}},
    "threat": {"exposed": 0.3},
}


def scenario(**changes: Any) -> Scenario:
    return parse(TABLES | changes, root=Path.cwd())


def sites(*sizes: tuple[int, ...]) -> tuple[Site, ...]:
    """Sites of patients with that many training records each; every patient is known at one site, the first also at the last."""
    made = []
    for index, patients in enumerate(sizes):
        entries = [
            Entry(id=f"{index}-{number}-{visit}", patient=f"{index}-{number}", label=0, split="train")
            for number, visits in enumerate(patients)
            for visit in range(visits)
        ]
        entries += [Entry(id=f"{index}-t", patient=f"{index}-t", label=1, split="test")]
        if index == len(sizes) - 1:
            entries += [Entry(id="again", patient="0-0", label=0, split="train")]
        made.append(Site(name=f"site-{index}", entries=tuple(entries), read=lambda entry: entry))
    return tuple(made)


SITES = sites((1,) * 20, (3, 2, 2, 1, 1, 1), (1,) * 7 + (2,) * 5)


def test_everybody_trains_as_in_the_sites_where_nothing_else_is_asked_for() -> None:
    for arrangement in ("federated", "untrained"):
        nodes = arrange(SITES, arrangement)
        assert [node.name for node in nodes] == ["site-0", "site-1", "site-2"]
        assert nodes[1].train == tuple((1, row) for row in range(10))
        assert nodes[1].test == ((1, 0),)


@pytest.mark.parametrize("arrangement", ["federated", "centralised", "iid"])
def test_every_record_is_used_once(arrangement: Arrangement) -> None:
    nodes = arrange(SITES, arrangement)
    everyone = [(index, row) for index, site in enumerate(SITES) for row in range(len(site.select("train")))]
    assert sorted(chain.from_iterable(node.train for node in nodes)) == everyone
    assert sorted(chain.from_iterable(node.test for node in nodes)) == [(0, 0), (1, 0), (2, 0)]


def test_one_node_holds_everything_or_one_site_trains_alone() -> None:
    (everything,) = arrange(SITES, "centralised")
    assert (everything.name, len(everything.train)) == ("all sites", 20 + 10 + 18)
    (largest,) = arrange(SITES, "siloed")
    assert (largest.name, len(largest.train)) == ("site-0", 20)
    (named,) = arrange(SITES, "siloed", silo="site-1")
    assert (named.name, {site for site, _ in named.train}) == ("site-1", {1})


def test_dealt_out_by_patient_at_the_sizes_of_the_sites() -> None:
    nodes = arrange(SITES, "iid", seed=3)
    assert [node.name for node in nodes] == ["mixed 1", "mixed 2", "mixed 3"]
    assert [len(node.train) for node in nodes] == [20, 10, 18]
    holders: dict[str, set[str]] = {}
    for node in nodes:
        for site, row in node.train:
            holders.setdefault(SITES[site].select("train")[row].patient, set()).add(node.name)
    assert {len(names) for names in holders.values()} == {1}
    assert arrange(SITES, "iid", seed=3) == nodes != arrange(SITES, "iid", seed=4)


def test_dealt_out_whatever_the_site() -> None:
    many = sites(*[(1,) * 300] * 3)
    for node in arrange(many, "iid", seed=1):
        shares = Counter(site for site, _ in node.train)
        assert all(abs(count - 100) < 4 * (300 * 2 / 9) ** 0.5 for count in shares.values())


def test_records_keep_the_site_they_come_from() -> None:
    made = scenario()
    whole = data.node_records(made, "centralised", 0, "train")
    assert Counter(whole.attributes["site"]) == {
        site.name: len(data.records(made, index, "train")) for index, site in enumerate(data.sites(made))
    }
    mixed = [data.node_records(made, "iid", node, "train") for node in range(3)]
    assert sorted(id for part in mixed for id in part.ids) == sorted(whole.ids)
    by_id = dict(zip(whole.ids, whole.images, strict=True))
    assert all(torch.equal(by_id[id], image) for part in mixed for id, image in zip(part.ids, part.images, strict=True))


def test_the_word_in_a_stack() -> None:
    assert arrangement_of("none") == arrangement_of("dp-sgd+top-k") == "federated"
    assert arrangement_of("dp-sgd+centralised") == "centralised"
    setting = scenario(compare=["centralised+gaussian"], defenses={"gaussian": {}}).settings()[0]
    assert (setting.id, setting.defenses, setting.arrangement) == ("centralised+gaussian", ("gaussian",), "centralised")


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"compare": ["centralized"]},
            "no defense labelled 'centralized' and no such arrangement; did you mean 'centralised'",
        ),
        ({"compare": ["iid+siloed"]}, "'iid\\+siloed' names 2 arrangements"),
        ({"defenses": {"iid": {"defense": "top-k"}}}, "defenses.iid: 'iid' is an arrangement"),
        ({"attacks": {"untrained": {"attack": "site-inference"}}}, "attacks.untrained: 'untrained' is an arrangement"),
        (
            {"federation": {"secure_aggregation": True}},
            "compare: 'centralised' has no updates of several sites to add up; leave it out, or federation.secure_aggregation",
        ),
        (
            {"threat": {"model": "malicious-server"}, "attacks": {"imprint": {}}},
            'attacks.imprint: an active attack.* \'centralised\' has none; .* attacks.imprint.against = \\["none", "iid"\\]',
        ),
    ],
)
def test_what_cannot_be_arranged_is_refused(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ScenarioError, match=told):
        scenario(**changes)


def test_a_site_that_is_not_there_cannot_be_alone() -> None:
    with pytest.raises(ScenarioError, match=r"federation\.silo: no site is called 'hospital-9'; did you mean 'hospital-"):
        audit.check(scenario(federation={"silo": "hospital-9"}))


def test_membership_is_not_asked_where_one_site_trains_alone() -> None:
    with pytest.raises(ScenarioError, match=r"attacks\.loss-threshold: under 'siloed' one site trains alone"):
        audit.check(scenario(attacks={"loss-threshold": {}}))
    audit.check(scenario(attacks={"loss-threshold": {"against": ["none", "centralised", "iid", "untrained"]}}))


def test_active_attacks_and_secure_aggregation_where_there_are_sites() -> None:
    active = {"threat": {"model": "malicious-server"}, "attacks": {"imprint": {"against": ["none", "iid"]}}}
    assert [setting.id for setting in scenario(**active).settings()] == ["none--imprint", "iid--imprint"]
    scenario(compare=["none", "iid"], federation={"secure_aggregation": True})


def test_one_scenario_from_images_to_verdict(tmp_path: Path) -> None:
    made = scenario(attacks={"site-inference": {"repeats": 1}})
    verdict = audit.run(made, out=tmp_path / "run")
    folder = RunFolder.open(tmp_path / "run")
    where = {setting.arrangement: folder.setting(setting) for setting in made.settings()}
    overall = [finding for finding in verdict.findings if not finding.site]
    assert [(finding.defense, finding.status) for finding in overall] == [(stack, "ok") for stack in made.compare]
    assert {setting.id: setting.nodes for setting in verdict.settings} == {
        "none": ("hospital-1", "hospital-2", "hospital-3"),
        "centralised": ("all sites",),
        "siloed": (data.nodes(made, "siloed")[0].name,),
        "iid": ("mixed 1", "mixed 2", "mixed 3"),
        "untrained": ("hospital-1", "hospital-2", "hospital-3"),
    }
    knowledge, asked = gather(made), set()
    for arrangement, place in where.items():
        seen, witnesses = open_capture(place / "capture", task=data.task(made)), read_witnesses(place)
        assert seen.candidates is not None
        asked.add(seen.candidates.images.numpy().tobytes())
        facts = truth(made, knowledge, witnesses)
        assert sorted(set(facts.site_of.values())) == sorted(
            {node.name for node in data.nodes(made, arrangement)} if arrangement != "untrained" else set()
        )
        for (round, node), records in facts.used.items():
            own = next(n for n in data.nodes(made, arrangement) if n.name == facts.site_of[node])
            assert len(records) == len(own.train)
            assert torch.equal(labels(made, witnesses)[round, node].bincount(), records.labels.bincount())
    assert len(asked) == 1
    initial = open_capture(where["untrained"] / "capture", task=data.task(made))
    assert (initial.observations, finished_rounds(where["untrained"] / "capture")) == ((), ())
    others = [open_capture(place / "capture", task=data.task(made)) for place in where.values()]
    assert all(same(initial.final[key], other.models[0][key]) for other in others for key in initial.final)
    assert not any("changed nothing" in caveat for caveat in verdict.caveats)
    assert "'untrained'" not in verdict.sentence


def test_what_nodes_of_an_arrangement_spend_is_told_and_caps_membership(tmp_path: Path) -> None:
    changes = {"defenses": {"dp-sgd": {"noise_multiplier": 4.0}}, "compare": ["iid+dp-sgd"], "attacks": {"loss-threshold": {}}}
    verdict = audit.run(scenario(**changes), out=tmp_path / "run")
    (setting,) = verdict.settings
    assert sorted(setting.epsilon) == ["mixed 1", "mixed 2", "mixed 3"]
    assert all(epsilon > 0 for epsilon in setting.epsilon.values())
    metrics = {metric.name for finding in verdict.findings if not finding.site for metric in finding.metrics}
    assert "largest AUC allowed" in metrics


def test_an_interrupted_arrangement_goes_on(tmp_path: Path) -> None:
    for setting in scenario().settings():
        whole, halved = tmp_path / "whole" / setting.id, tmp_path / "halved" / setting.id
        inline.run(scenario(), setting, folder=whole)
        if setting.rounds:
            inline.run(scenario(), replace(setting, rounds=1), folder=halved)
        inline.run(scenario(), setting, folder=halved, resume=True)
        one, two = (open_capture(place / "capture", task=data.task(scenario())) for place in (whole, halved))
        assert len(one.models) == len(two.models) == setting.rounds + 1
        assert all(same(one.final[key], two.final[key]) for key in one.final)


@pytest.mark.slow
def test_the_same_captures_on_both_engines(tmp_path: Path) -> None:
    made = scenario(compare=["iid"])
    (setting,) = made.settings()
    inline.run(made, setting, folder=tmp_path / "inline")
    simulation.run(made, setting, folder=tmp_path / "simulation")
    steps, finals = [], []
    for engine in ("inline", "simulation"):
        steps.append(sorted((w.round, w.site, w.steps) for w in read_witnesses(tmp_path / engine)))
        finals.append(open_capture(tmp_path / engine / "capture", task=data.task(made)).final)
    assert steps[0] == steps[1]
    assert len(steps[0]) == 2 * 3
    for key, value in finals[0].items():
        torch.testing.assert_close(finals[1][key], value, rtol=1e-5, atol=1e-6)
