"""A glass federation: small, really trained, its truth in plain sight, so that an attack which works must succeed on it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flpriv.attack import Attack, ProtocolTrap, Trap
from flpriv.canary import Planted, coins, plant
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.seeds import derive
from flpriv.state import State, add, is_parameter
from flpriv.sums import sums
from flpriv.task import Task
from flpriv.threat import Can
from flpriv.truth import Truth

CLASSES = ("left", "right", "both")
SIDE = 16
GRAIN = 0.15
EVERYTHING = Can(sum(can.value for can in Can))


@dataclass(frozen=True, kw_only=True)
class Glass:
    """What an attack gets and what really happened.

    Args:
        capture: everything granted, ``Can.TAMPER`` only for an active attack.
        truth: of that capture.
    """

    capture: Capture
    truth: Truth


@dataclass(frozen=True, kw_only=True)
class _Plan:
    """How the federation trains for one goal.

    Args:
        sites: how many.
        records: of each site.
        rounds: how many.
        recipe: of each site.
        signal: how clearly images show their class, 0 is not at all.
        skew: share of a site's records that are of the site's own class; the others are of any.
    """

    sites: int
    records: int
    rounds: int
    recipe: LocalRecipe
    signal: float
    skew: float


def _plan(goal: Goal, *, active: bool) -> _Plan:
    if goal is Goal.RECONSTRUCTION:
        records = 4 if active else 1
        recipe = LocalRecipe(lr=0.1, batch_size=records, steps=1)
        return _Plan(sites=2, records=records, rounds=1, recipe=recipe, signal=0.2, skew=0.0)
    recipe = LocalRecipe(lr=0.05, momentum=0.5, batch_size=12, epochs=30)
    clear = goal is Goal.ATTRIBUTE
    return _Plan(sites=3, records=24, rounds=4, recipe=recipe, signal=0.15 if clear else 0.0, skew=0.9 if clear else 0.0)


def dense_net(*, inputs: int = SIDE * SIDE, width: int = 128, classes: int = len(CLASSES)) -> nn.Module:
    """A dense network of one hidden layer, for images of ``inputs`` pixels: what the glass federation trains.

    Args:
        inputs: pixels of an image, channels included.
        width: hidden neurons.
        classes: outputs.
    """
    return nn.Sequential(nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, classes))


def glass(
    goal: Goal,
    *,
    attack: Attack | None = None,
    model: str = "flpriv.testing:dense_net",
    options: Mapping[str, Any] | None = None,
    plugins: tuple[str, ...] = (),
    seed: int = 0,
) -> Glass:
    """Train a glass federation on made-up images ``(1, 16, 16)`` in which an attack with this goal can succeed.

    For reconstructions each site takes one step on one image (on four under a trap); otherwise three sites train until they
    know their records by heart.

    Args:
        goal: what the attack is after.
        attack: an active attack, whose trap is then sent, or one with canaries, which the first site then plants.
        model: registered name or import path; the default is :func:`dense_net`.
        options: of the model.
        plugins: files the model may come from.
        seed: of everything.
    """
    task = Task(
        modality="xray", shape=(1, SIDE, SIDE), classes=CLASSES, model=model, options=dict(options or {}), plugins=plugins
    )
    public = phantoms(48, site="public", signal=0.2, skew=0.0, own=0, seed=derive(seed, "public"))
    rng = torch.Generator().manual_seed(derive(seed, "trap"))
    active = attack is not None and (type(attack).trap is not Attack.trap or type(attack).aim is not Attack.aim)
    plan = _plan(goal, active=active)
    names = [f"site {place}" for place in range(plan.sites)]

    def draw(place: int, what: str) -> Records:
        own = place % len(CLASSES)
        where = derive(seed, what, place)
        return phantoms(plan.records, site=names[place], signal=plan.signal, skew=plan.skew, own=own, seed=where)

    members = [draw(place, "train") for place in range(plan.sites)]
    others = [draw(place, "test") for place in range(plan.sites)]
    candidates = Records.concat([*members, *others])
    trap = None
    if attack is not None:
        trap = attack.aim(task, public=public.anonymous(), candidates=candidates.anonymous(), rng=rng)
    nodes = {derive(seed, "node", place): place for place in range(plan.sites)}
    planted = _planted(attack, task, public.anonymous(), node=next(iter(nodes)), site=names[0], seed=seed)
    trained = {node: planted.joined(members[place]) if planted and not place else members[place] for node, place in nodes.items()}
    observations, models = _federate(task, plan, trained, trap=trap, attack=attack, planted=planted, seed=seed)
    exposed = Records.concat([records.take(range(0, len(records), 6)) for records in members])
    capture = Capture(
        granted=EVERYTHING if trap is not None else EVERYTHING & ~Can.TAMPER,
        task=task,
        observations=observations,
        models=models,
        public=public.anonymous(),
        candidates=candidates.anonymous(),
        exposed=exposed.anonymous(keep=("site", "sex", "age")),
        secrets=trap.secrets if trap is not None else {},
        canaries=planted.canaries if planted is not None else None,
    )
    truth = Truth(
        used={(o.round, o.node): trained[o.node] for o in observations if o.node is not None},
        site_of={node: names[place] for node, place in nodes.items()},
        members=torch.arange(len(candidates)) < sum(map(len, members)),
        candidates=candidates,
        everyone=Records.concat(members),
        public=public,
        planted=planted,
    )
    return Glass(capture=capture, truth=truth)


def blindfold(capture: Capture, *, seed: int = 0) -> Capture:
    """The same capture without its evidence: updates are noise of the same size, models are untrained ones.

    What was sent under a trap, the secrets and all side knowledge stay.
    """
    rng = torch.Generator().manual_seed(derive(seed, "blindfold"))
    untrained = capture.task.build(seed=derive(seed, "untrained")).state_dict()

    def blind(seen: Observation) -> Observation:
        sent = seen.sent if seen.trap else untrained
        noise = {
            key: torch.randn(value.shape, generator=rng, dtype=value.dtype) * value.square().mean().sqrt()
            for key, value in seen.update.items()
        }
        return replace(seen, sent=sent, returned=add(sent, noise), metrics={})

    return replace(
        capture,
        observations=tuple(blind(seen) for seen in capture.observations),
        models=(untrained,) * len(capture.models),
    )


def withhold(capture: Capture, granted: Can) -> Capture:
    """What is left of the capture for an adversary who is granted no more than ``granted``; who tampers keeps what was opened."""

    def redact(seen: Observation) -> Observation:
        labels = seen.labels if Can.KNOW_LABELS in granted else None
        if labels is not None and Can.KNOW_ORDER not in granted:
            labels = labels.sort().values
        local = seen.local if Can.KNOW_LOCAL in granted else None
        defenses = seen.defenses if Can.KNOW_DEFENSES in granted else None
        return replace(seen, labels=labels, local=local, defenses=defenses)

    seen = tuple(map(redact, capture.observations))
    if Can.SEE_UPDATES not in granted:
        opened = tuple(one for one in seen if one.opened and Can.TAMPER in granted)
        seen = opened + (sums(seen) if Can.SEE_MODELS in granted else ())
    models = capture.models if Can.SEE_MODELS in granted else capture.models[-1:] if Can.SEE_FINAL in granted else ()
    return replace(
        capture,
        granted=capture.granted & granted,
        observations=seen,
        models=models,
        public=capture.public if Can.KNOW_PUBLIC in granted else None,
        candidates=capture.candidates if Can.KNOW_CANDIDATES in granted else None,
        exposed=capture.exposed if Can.KNOW_EXPOSED in granted else None,
        secrets=capture.secrets if Can.TAMPER in granted else {},
    )


def phantoms(count: int, *, site: str, signal: float, skew: float, own: int, seed: int) -> Records:
    """Made-up chests ``(1, 16, 16)``: a body, a heart somewhere, grain, and a faint pattern of their class.

    Class decides sex and, roughly, age; with ``skew`` most of a site's records are of its ``own`` class.

    Args:
        count: how many.
        site: their site's name.
        signal: strength of the class's pattern.
        skew: share of records of class ``own``.
        own: class index.
        seed: of the draw; the classes' patterns are always the same.
    """
    rng = torch.Generator().manual_seed(seed)
    labels = torch.randint(len(CLASSES), (count,), generator=rng)
    labels = torch.where(torch.rand(count, generator=rng) < skew, torch.full_like(labels, own), labels)
    y, x = torch.meshgrid(torch.linspace(-1, 1, SIDE), torch.linspace(-1, 1, SIDE), indexing="ij")

    def blob(size: float) -> Tensor:
        centre = (torch.rand(count, 2, generator=rng) - 0.5).mul(0.8)[:, :, None, None]
        width = size * (0.7 + 0.6 * torch.rand(count, 2, generator=rng))[:, :, None, None]
        return torch.exp(-(((y - centre[:, 0]) / width[:, 0]) ** 2 + ((x - centre[:, 1]) / width[:, 1]) ** 2))

    patterns = torch.randn(len(CLASSES), SIDE, SIDE, generator=torch.Generator().manual_seed(7)).sign()
    images = 0.15 + 0.45 * blob(0.7) + 0.2 * blob(0.25) + signal * patterns[labels] / 2
    images = (images + GRAIN * torch.randn(count, SIDE, SIDE, generator=rng)).clamp(0, 1)
    ids = tuple(f"{site}-{seed % 9973}-{place}" for place in range(count))
    return Records(
        images=images[:, None],
        labels=labels,
        ids=ids,
        patients=ids,
        attributes={
            "site": (site,) * count,
            "sex": tuple("FM"[label % 2] for label in labels.tolist()),
            "age": tuple(str(35 + 15 * label) for label in labels.tolist()),
        },
    )


def train(model: nn.Module, records: Records, recipe: LocalRecipe, *, seed: int, planted: Planted | None = None) -> Tensor:
    """The bare loop of an SGD recipe; returns the labels in order of use. Canaries that are gradients join its steps."""
    optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum)
    if planted is not None:
        size, batch = len(records), min(recipe.batch_size, len(records))
        plant(model, optimizer, planted.canaries, planted.included, batch=batch, records=size, seed=derive(seed, "canaries"))
    model.train(recipe.train_mode)
    used = []
    for rows in _batches(len(records), recipe, torch.Generator().manual_seed(seed)):
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(records.images[rows]), records.labels[rows]))
        optimizer.step()
        used.append(records.labels[rows])
    return torch.cat(used)


def _batches(count: int, recipe: LocalRecipe, rng: torch.Generator) -> Iterator[Tensor]:
    """Rows of each local step: whole epochs, or the recipe's number of steps."""

    def epochs() -> Iterator[Tensor]:
        for _ in range(recipe.epochs if recipe.steps is None else recipe.steps):
            yield from torch.split(torch.randperm(count, generator=rng), recipe.batch_size)

    return islice(epochs(), recipe.steps)


def _planted(attack: Attack | None, task: Task, public: Records, *, node: int, site: str, seed: int) -> Planted | None:
    """The attack's canaries and their coins."""
    initial = task.build(seed=derive(seed, "initial"))
    rng = torch.Generator().manual_seed(derive(seed, "canaries"))
    found = attack.canaries(task, model=initial, public=public, rng=rng) if attack is not None else None
    if found is None:
        return None
    if found.level == "site":
        raise ValueError("the glass federation has no canaries that are sites; check the attack with others")
    included = coins(len(found), seed=derive(seed, "coins"))
    return Planted(canaries=replace(found, nodes=(node,)), included=included, place=0, site=site)


def _federate(
    task: Task,
    plan: _Plan,
    members: Mapping[int, Records],
    *,
    trap: Trap | None,
    attack: Attack | None,
    planted: Planted | None,
    seed: int,
) -> tuple[tuple[Observation, ...], tuple[State, ...]]:
    """Plain federated averaging; the trap is sent to every node it wants, its update disarmed before the mean.

    A trap in secure aggregation opens every reply.
    """
    honest: State = task.build(seed=derive(seed, "initial")).state_dict()
    opened = isinstance(trap, ProtocolTrap)
    seen, models = [], [honest]
    for round in range(1, plan.rounds + 1):
        total = {key: torch.zeros_like(value) for key, value in honest.items() if is_parameter(key, value)}
        for node, records in members.items():
            armed = trap.arm(honest, round=round, node=node, nodes=tuple(members)) if trap is not None else None
            model = task.build()
            if armed is not None and attack is not None:
                model = attack.architecture(model, task)
            sent = _copy(honest if armed is None else armed)
            model.load_state_dict(dict(sent))
            sown = planted if planted is not None and node in planted.canaries.nodes else None
            labels = train(model, records, plan.recipe, seed=derive(seed, "train", round, node), planted=sown)
            observation = Observation(
                round=round,
                node=node,
                sent=sent,
                returned=_copy(model.state_dict()),
                examples=len(records),
                local=plan.recipe,
                defenses=(),
                labels=labels,
                trap=attack.name if (armed is not None or opened) and attack is not None else "",
                nodes=tuple(members),
                opened=opened,
            )
            seen.append(observation)
            back = observation.returned
            if armed is not None and trap is not None:
                back = trap.disarm(back, sent=sent, honest=honest)
            for key in total:
                total[key] += (back[key] - honest[key]) / len(members)
        honest = add(honest, total)
        models.append(honest)
    return tuple(seen), tuple(models)


def _copy(state: State) -> dict[str, Tensor]:
    return {key: value.detach().clone() for key, value in state.items()}
