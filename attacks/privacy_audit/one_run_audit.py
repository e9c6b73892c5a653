"""One-run audit: many canaries at once, each in by a coin, and how surely a single training run tells the coins."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen, losses
from flpriv.attacks.privacy_audit.gradients import along, craft, flat
from flpriv.canary import Canaries, direction
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, PrivacyBound
from flpriv.errors import CaptureError, ScenarioError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class OneRunAudit(Attack):
    """Plants canaries at a site that works with the auditor, and scores each; the scores prove a lower bound on epsilon.

    The federation with canaries is one of its own. The adversary is the one differential privacy is about: it holds the canaries,
    knows where they are, and sees what the threat model grants, single updates if it may, else sums, else the final model.

    Record kinds use the images set aside as public, turned and shifted copies where those are too few. A gradient needs no image:
    it joins the clipped and summed gradients of a step, is the strongest record there can be, and so comes nearest to what the
    proof is about. Such canaries are scored by how far the updates went along them, records by their
    loss or by how far the updates went along their gradient (Andrew et al. 2023 score whole clients so).

    Args:
        kind: ``"random-gradient"`` (Nasr et al. 2023; each of length ``norm`` along a random direction), ``"mislabelled"`` or
            ``"natural"`` records, or ``"crafted"`` ones (CANIFE, Maddock et al. 2022: their gradients at the initial model stand
            across those of public records).
        level: ``"record"``, or ``"site"``: each canary is a site without data, whose update in every round is of length ``norm``
            along a random direction, or zero (after Andrew et al. 2023). It passes the defences that act on updates as any
            site's does, and those are what it tests; a defence of single records says nothing of it.
        count: canaries, in and out together; more can show a larger epsilon, and disturb training more.
        norm: length of a gradient, cut where those of records are; of a crafted record's gradient the least length.
        score: of records: ``"loss"`` under the last model that their site sent, or the final one where that is all there is;
            ``"update"`` for how far the updates went along their gradients; by default that for crafted records alone.
        steps: of the search for crafted records.
        spread: look at no more than this many rounds for the gradients of records, spread evenly.
        delta: at which the bound is said where no defence claims an epsilon at another.
        confidence: of the bound.
    """

    name: ClassVar[str] = "one-run-audit"
    goal: ClassVar[Goal] = Goal.PRIVACY_BOUND
    needs: ClassVar[Can] = Can.SEE_FINAL
    paper: ClassVar[str] = "Steinke, Nasr and Jagielski 2023, https://arxiv.org/abs/2305.08846"

    kind: Literal["random-gradient", "mislabelled", "natural", "crafted"] = "random-gradient"
    level: Literal["record", "site"] = "record"
    count: Annotated[int, Field(ge=10)] = 200
    norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    score: Literal["update", "loss"] | None = None
    steps: Annotated[int, Field(ge=1)] = 30
    spread: Annotated[int, Field(ge=1)] = 10
    delta: Annotated[float, Field(gt=0, lt=1)] = 1e-5
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95

    def __post_init__(self) -> None:
        """Refuse sites that would be records."""
        if self.level == "site" and self.kind != "random-gradient":
            raise ValueError(f"level = 'site' plants no records: leave kind = {self.kind!r} out")

    def canaries(self, task: Task, *, model: nn.Module, public: Records | None, rng: torch.Generator) -> Canaries:
        """The canaries; images are the public ones in random order, then turned and shifted copies of them.

        Raises:
            ScenarioError: for a record kind without public images, or a task of one class.
        """
        if self.kind == "random-gradient":
            seeds = torch.randint(2**62, (self.count,), generator=rng)
            return Canaries(seeds=seeds, norm=self.norm, level=self.level)
        if public is None or not len(public):
            raise ScenarioError(f"{self.name}: kind = {self.kind!r} needs public images; set sites.split.public")
        if self.kind != "natural" and len(task.classes) < 2:
            raise ScenarioError(f"{self.name}: kind = {self.kind!r} needs a second class to mislabel with; use 'natural'")
        records = _copies(public, self.count, rng)
        if self.kind != "natural":
            shift = torch.randint(1, len(task.classes), (self.count,), generator=rng)
            records = Records(images=records.images, labels=(records.labels + shift) % len(task.classes))
        if self.kind == "crafted":
            others = public.take(torch.randperm(len(public), generator=rng)[:32])
            records = craft(model.eval(), records, others, norm=self.norm, steps=self.steps)
        return Canaries(records=records)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[PrivacyBound]:
        """One claim, scores ``(m,)``; deterministic.

        Raises:
            CaptureError: for a capture without canaries, or without the update or model that scores are read from.
            UpdateError: if a captured model is not the task's.
        """
        if (canaries := capture.canaries) is None:
            raise CaptureError(f"{self.name}: the capture holds no canaries; run the federation anew with this attack in it")
        seen = [o for o in capture.observations if o.node is None or not canaries.nodes or o.node in canaries.nodes]
        by = self.score or ("update" if self.kind == "crafted" else "loss")
        if canaries.seeds is not None:
            scores = _along_directions(canaries, canaries.seeds, capture, seen)
        elif canaries.records is not None and seen and by == "update":
            scores = _along_gradients(canaries.records, capture, _spread(seen, self.spread), who=self.name)
        else:
            assert canaries.records is not None
            own = [observation.returned for observation in seen if observation.node is not None]
            model = frozen(capture.task, own[-1] if own else capture.final, who=f"{self.name}: the last model")
            scores = -losses(model, canaries.records)
        return [PrivacyBound(scores=scores, delta=self.delta, confidence=self.confidence)]


def _along_directions(canaries: Canaries, seeds: Tensor, capture: Capture, seen: Sequence[Observation]) -> Tensor:
    """How far all updates together went along each direction; without updates, how far the models went, or stand.

    Gradients are followed downhill, the updates of sites uphill; of a site's own updates none but those tell of it.
    """
    moved: dict[int | None, Tensor] = {}
    for observation in seen:
        node = observation.node if canaries.level == "site" else None
        moved[node] = moved.get(node, 0) + flat(observation.update)
    if not seen:
        moved[None] = flat(capture.final) - (flat(capture.models[0]) if len(capture.models) > 1 else 0)
    nodes = canaries.nodes if canaries.level == "site" and None not in moved else (None,) * len(seeds)
    sign, still = (1 if canaries.level == "site" else -1), torch.zeros(())
    scores = []
    for seed, node in zip(seeds.tolist(), nodes, strict=True):
        places, entries = direction(seed, capture.final)
        own = moved.get(node, still)
        scores.append(sign * (own[places].double() @ entries.double()) if own.ndim else still.double())
    return torch.stack(scores)


def _along_gradients(records: Records, capture: Capture, seen: Sequence[Observation], *, who: str) -> Tensor:
    """How far all updates together went along each record's gradient at the model that was sent."""
    found = torch.zeros(len(records), dtype=torch.float64)
    for observation in track(seen, who):
        model = frozen(capture.task, observation.sent, who=f"{who}: the model of round {observation.round}")
        found += along(model, records, flat(observation.update))
    return found


def _copies(public: Records, count: int, rng: torch.Generator) -> Records:
    """``count`` images: public ones in random order, then copies of them, shifted around the edge and some upside down."""
    order = torch.randperm(len(public), generator=rng)
    rows = order.repeat(-(-count // len(public)))[:count]
    images = public.images[rows].clone()
    for place in range(len(public), count):
        sides = tuple(range(1, images.ndim - 1))
        shifts = [int(torch.randint(images.shape[side + 1], (), generator=rng)) for side in sides]
        image = images[place].roll(shifts, sides)
        images[place] = image.flip(sides[0]) if torch.rand((), generator=rng) < 0.5 else image
    return Records(images=images, labels=public.labels[rows])


def _spread(seen: Sequence[Observation], most: int) -> list[Observation]:
    if len(seen) <= most:
        return list(seen)
    return [seen[place] for place in torch.linspace(0, len(seen) - 1, most).round().long().tolist()]
