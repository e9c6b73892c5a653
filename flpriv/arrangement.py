"""Arrangements: which nodes train on whose records, so that federated learning can be compared with its alternatives."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from types import MappingProxyType
from typing import Literal, get_args

from flpriv.seeds import derive
from flpriv.site import Site

Arrangement = Literal["federated", "centralised", "siloed", "iid", "untrained"]
FEDERATED: Arrangement = "federated"
RESERVED: Mapping[str, Arrangement] = MappingProxyType(
    {"centralised": "centralised", "siloed": "siloed", "iid": "iid", "untrained": "untrained"}
)
"""Words that a stack of ``compare`` may hold beside labels of defences, one at most:

- ``centralised``: one node holds the records of all sites;
- ``siloed``: one site trains alone;
- ``iid``: as many nodes as sites and as large as they are, patients dealt out at random whatever their site;
- ``untrained``: the initial weights, no round of training.
"""
ArrangedSplit = Literal["train", "test"]

Place = tuple[int, int]
"""A record: index of its site, row among the records of that site's split."""


def arrangement_of(stack: str) -> Arrangement:
    """The arrangement that a stack of ``compare`` names, ``"federated"`` where it names none."""
    return next((RESERVED[word] for word in stack.split("+") if word in RESERVED), FEDERATED)


def undefended(stacks: Iterable[str]) -> str:
    """Which of ``stacks`` stands for the federation without defences: ``"none"``, else the first arrangement alone."""
    known = list(stacks)
    alone = next((stack for stack in known if stack in RESERVED and stack != "untrained"), "none")
    return "none" if "none" in known else alone


@dataclass(frozen=True, kw_only=True)
class Node:
    """One participant of an arrangement.

    Args:
        name: a site's own name, ``"all sites"``, or ``"mixed 1"`` and so on.
        train: the records it trains on.
        test: the records it evaluates on.
    """

    name: str
    train: tuple[Place, ...]
    test: tuple[Place, ...]

    def places(self, split: ArrangedSplit) -> tuple[Place, ...]:
        """The records of one split."""
        return self.train if split == "train" else self.test


def arrange(sites: Sequence[Site], arrangement: Arrangement, *, silo: str | None = None, seed: int = 0) -> tuple[Node, ...]:
    """The nodes of an arrangement, in a fixed order; whole patients, and no record twice.

    Args:
        sites: with every entry's split decided.
        arrangement: ``"untrained"`` has the nodes of ``"federated"``, which are the sites themselves.
        silo: name of the site that trains alone where ``"siloed"``; the one with most training records if not given.
        seed: of the draw of ``"iid"``.
    """
    own = tuple(Node(name=site.name, train=_own(site, i, "train"), test=_own(site, i, "test")) for i, site in enumerate(sites))
    if arrangement == "centralised":
        everything = [tuple(place for node in own for place in node.places(split)) for split in get_args(ArrangedSplit)]
        return (Node(name="all sites", train=everything[0], test=everything[1]),)
    if arrangement == "siloed":
        return (next((node for node in own if node.name == silo), max(own, key=lambda node: len(node.train))),)
    if arrangement == "iid":
        train, test = (_deal(sites, own, split, seed=seed) for split in get_args(ArrangedSplit))
        return tuple(Node(name=f"mixed {i + 1}", train=train[i], test=test[i]) for i in range(len(own)))
    return own


def _own(site: Site, index: int, split: ArrangedSplit) -> tuple[Place, ...]:
    return tuple((index, row) for row in range(len(site.select(split))))


def _deal(sites: Sequence[Site], own: Sequence[Node], split: ArrangedSplit, *, seed: int) -> list[tuple[Place, ...]]:
    """Patients in random order, those with most records first, each to the node that lacks the largest share of its size."""
    sizes = [len(node.places(split)) for node in own]
    held: dict[str, list[Place]] = {}
    for index, site in enumerate(sites):
        for row, entry in enumerate(site.select(split)):
            held.setdefault(entry.patient, []).append((index, row))
    dealt: list[list[Place]] = [[] for _ in own]
    for patient in sorted(held, key=lambda patient: (-len(held[patient]), derive(seed, "iid", split, patient))):
        room = [Fraction(size - len(places), max(size, 1)) for size, places in zip(sizes, dealt, strict=True)]
        dealt[room.index(max(room))] += held[patient]
    return [tuple(sorted(places)) for places in dealt]
