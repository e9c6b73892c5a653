"""What the adversary is given besides its capture, and what only the auditor knows; both from the sites' own records."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch

from flpriv import data
from flpriv.canary import Planted
from flpriv.records import Records
from flpriv.seeds import derive
from flpriv.truth import Claimed, Truth
from flpriv.witness import Witness

if TYPE_CHECKING:
    from torch import Tensor

    from flpriv.scenario import Scenario

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Knowledge:
    """Records about the federation, with ids; what an adversary receives of them is made anonymous first.

    Args:
        public: images of patients of no site, ``None`` where the split sets none aside.
        exposed: training records the adversary holds with site, sex and age.
        candidates: members and non-members in random order; no exposed patient is among them.
        members: ``(N,)`` bool, which candidates were trained on.
    """

    public: Records | None
    exposed: Records
    candidates: Records
    members: Tensor


def gather(scenario: Scenario) -> Knowledge:
    """Draw the adversary's side knowledge, the same for every setting of a scenario.

    Whole patients are exposed, at least two of each site (one where it has only two). Candidates are as many members as
    non-members of each site where there are enough, at most ``threat.candidates`` in all.
    """
    table = scenario.threat_table
    sites = data.sites(scenario)
    quota = max(1, table.candidates // (2 * len(sites)))
    exposed, candidates, members, public = [], [], [], []
    for index, site in enumerate(sites):
        train, test = data.records(scenario, index, "train"), data.records(scenario, index, "test")
        public.append(data.records(scenario, index, "public"))
        shown = set(_patients(train, table.exposed, seed=derive(scenario.seed, "exposed", site.name)))
        exposed.append(train.take([i for i, patient in enumerate(train.patients) if patient in shown]))
        hidden = [i for i, patient in enumerate(train.patients) if patient not in shown]
        own = _sample(hidden, quota, seed=derive(scenario.seed, "members", site.name))
        others = _sample(range(len(test)), quota, seed=derive(scenario.seed, "non-members", site.name))
        candidates += [train.take(own), test.take(others)]
        members += [True] * len(own) + [False] * len(others)
    everyone = Records.concat(candidates)
    order = torch.randperm(len(everyone), generator=torch.Generator().manual_seed(derive(scenario.seed, "candidates")))
    return Knowledge(
        public=Records.concat(public) if any(map(len, public)) else None,
        exposed=Records.concat(exposed),
        candidates=everyone.take(order),
        members=torch.tensor(members, dtype=torch.bool)[order],
    )


def truth(scenario: Scenario, knowledge: Knowledge, witnesses: Sequence[Witness], *, planted: Planted | None = None) -> Truth:
    """What really happened in one federation, from the sites' witnesses and the canaries planted in it."""
    sites = data.sites(scenario)
    trained = _trained(scenario, planted)
    row = {id: i for i, id in enumerate(trained.ids)}
    used = {(witness.round, witness.node): trained.take([row[id] for id in witness.used]) for witness in witnesses}
    everyone = [data.records(scenario, index, split) for index in range(len(sites)) for split in ("train", "test")]
    return Truth(
        used=used,
        site_of={witness.node: witness.site for witness in witnesses},
        members=knowledge.members,
        candidates=knowledge.candidates,
        everyone=Records.concat([part for part in everyone if len(part)]),
        public=knowledge.public,
        planted=planted,
        claimed=_claimed(witnesses),
    )


def labels(scenario: Scenario, witnesses: Sequence[Witness], *, planted: Planted | None = None) -> dict[tuple[int, int], Tensor]:
    """The labels behind each update, in order of use, by (round, node)."""
    trained = _trained(scenario, planted)
    row = {id: i for i, id in enumerate(trained.ids)}
    return {(w.round, w.node): trained.labels[[row[id] for step in w.steps for id in step]] for w in witnesses}


def _trained(scenario: Scenario, planted: Planted | None) -> Records:
    """The training records of all sites: ids tell them apart, whichever node an arrangement gives them to."""
    parts = [data.records(scenario, index, "train") for index in range(len(data.sites(scenario)))]
    if planted is not None and planted.place is not None:
        parts[planted.place] = planted.joined(parts[planted.place])
    return Records.concat(parts)


def _claimed(witnesses: Sequence[Witness]) -> dict[str, Claimed]:
    last = {witness.site: witness for witness in sorted(witnesses, key=lambda witness: witness.round) if witness.refused is None}
    found = {}
    for site, witness in last.items():
        notes = [note for note in witness.notes.values() if "epsilon" in note and "delta" in note]
        if notes:
            least = min(notes, key=lambda note: float(note["epsilon"]))
            found[site] = Claimed(epsilon=float(least["epsilon"]), delta=float(least["delta"]))
    return found


def _patients(records: Records, share: float, *, seed: int) -> list[str]:
    patients = sorted(set(records.patients))
    wanted = min(max(2, round(share * len(patients))), max(1, len(patients) - 1))
    return _sample(patients, wanted, seed=seed)


def _sample(items: Sequence[T], count: int, *, seed: int) -> list[T]:
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    return [items[i] for i in sorted(order[:count])]
