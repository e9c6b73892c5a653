"""Rounds of several sites under a trap, whose replies the adversary sees one by one or as a sum."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from flpriv.attack import Attack
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.defense import Defense, Local, Loop
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import create
from flpriv.state import State, add, difference
from flpriv.sums import sums
from flpriv.task import Task
from flpriv.threat import threat


@dataclass(frozen=True, kw_only=True)
class Rounds:
    """What the adversary holds, each reply by itself, the records of each node, and why nodes refused a model."""

    capture: Capture
    replies: tuple[Observation, ...]
    used: Mapping[int, Records]
    refused: tuple[str, ...] = ()


def rounds(
    attack: Attack,
    sites: Sequence[Records],
    *,
    recipe: LocalRecipe,
    model: str = "cnn",
    options: Mapping[str, Any] | None = None,
    classes: int = 2,
    mean: float = 0.0,
    std: float = 1.0,
    public: Records | None = None,
    summed: bool = True,
    grant: tuple[str, ...] = (),
    defenses: Sequence[tuple[str, Mapping[str, Any]]] = (),
    count: int = 1,
    seed: int = 0,
) -> Rounds:
    """``count`` rounds from one and the same honest model; sites draw other batches in each, unless a batch is all they have."""
    shape = tuple(sites[0].images.shape[1:])
    names = tuple(map(str, range(classes)))
    task = Task(modality="xray", shape=shape, classes=names, model=model, options=options or {}, mean=mean, std=std)
    honest = {key: value.clone() for key, value in task.build(seed=seed).state_dict().items()}
    trap = attack.trap(task, public=public, rng=torch.Generator().manual_seed(seed))
    assert trap is not None
    nodes = tuple(901 - 7 * place for place in range(len(sites)))
    replies, refused = [], []
    stack: list[Defense] = [create("defenses", name, chosen) for name, chosen in defenses]
    told = tuple((one.name, TypeAdapter(type(one)).dump_python(one, mode="json")) for one in stack)
    for round in range(1, count + 1):
        for place, (node, records) in enumerate(zip(nodes, sites, strict=True)):
            armed = trap.arm(honest, round=round, node=node, nodes=nodes)
            net = task.build(seed=seed) if armed is None else attack.architecture(task.build(seed=seed), task)
            sent = dict(honest if armed is None else armed)
            net.load_state_dict(sent)
            rng = torch.Generator().manual_seed(1000 * seed + 10 * round + place)
            local = Local(site=str(node), round=round, rng=rng, task=task, records=partial(_itself, records))
            if found := [no.reason for one in stack if (no := one.inspect(sent, local=local)) is not None]:
                refused.append(found[0])
                continue
            prepare = partial(_prepared, stack=stack, local=local)
            steps = train(net, records, recipe, classes=classes, seed=100 * seed + 10 * round + place, prepare=prepare).steps
            rows = [row for step in steps for row in step]
            returned = {key: value.detach().clone() for key, value in net.state_dict().items()}
            if stack:
                update: State = difference(returned, sent)
                for one in stack:
                    update = one.protect(update, local=local)
                returned = add({**returned, **{key: sent[key] for key in update}}, update)
            replies.append(
                Observation(
                    round=round,
                    node=node,
                    sent=sent,
                    returned=returned,
                    examples=len(records),
                    local=recipe,
                    defenses=told,
                    labels=records.labels[rows].sort().values if "know-labels" in grant else None,
                    trap="" if armed is None else attack.name,
                    nodes=nodes,
                )
            )
    granted = threat("malicious-sums-only" if summed else "malicious-server", grant=grant).granted
    capture = Capture(
        granted=granted,
        task=task,
        observations=sums(replies) if summed else tuple(replies),
        models=(honest,) * (count + 1),
        public=public,
        secrets=trap.secrets,
    )
    used = dict(zip(nodes, sites, strict=True))
    return Rounds(capture=capture, replies=tuple(replies), used=used, refused=tuple(refused))


def _prepared(loop: Loop, *, stack: Sequence[Defense], local: Local) -> Loop:
    for one in stack:
        loop = one.prepare(loop, local=local)
    return loop


def _itself(records: Records) -> Records:
    return records


def parts(records: Records, sizes: Sequence[int]) -> list[Records]:
    """Neighbouring records, so many for each site."""
    ends = torch.tensor([0, *sizes]).cumsum(0).tolist()
    return [records.take(range(a, b)) for a, b in itertools.pairwise(ends)]


@pytest.fixture(scope="session", name="rounds")
def rounds_fixture() -> Callable[..., Rounds]:
    return rounds


@pytest.fixture(scope="session", name="parts")
def parts_fixture() -> Callable[..., list[Records]]:
    return parts
