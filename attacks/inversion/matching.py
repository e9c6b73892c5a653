"""Gradient matching: the attack under every optimisation attack."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attack import Attack
from flpriv.attacks.inversion.evidence import Evidence, gather, honest, sensitivity
from flpriv.attacks.inversion.exact import invert_exactly
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import Problems
from flpriv.attacks.inversion.search import Found
from flpriv.attacks.inversion.stages import carry_out
from flpriv.attacks.inversion.tournament import likeliest
from flpriv.capture import Capture
from flpriv.claim import Goal, Reconstruction
from flpriv.state import fingerprint
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class MatchingAttack(Attack):
    """An attack that searches for images whose update is the observed one. A named attack adds its :meth:`plan` alone.

    An update of several local steps is matched by replaying the steps on the trial. Labels that are not granted are read from
    the last layer. Where the order of steps matters and is not granted, a contest of short searches finds the likeliest ones, one
    for each restart. Images that an update determines are computed before any search
    (:func:`flpriv.attacks.inversion.exact.invert_exactly`). Restarts are judged by the objective alone.

    Adam's steps are replayed too: one gives an image away; after four, what was found of X-rays of 32 pixels was hardly nearer to
    them than public images are.

    Args:
        iterations: of the search, ≥ 1.
        restarts: searches from fresh starts for each update, ≥ 1.
        orders: orders of the local steps in the contest, ≥ 1; 1 draws one at random for each restart. Four images have no more
            than 24. A contest takes 32 evaluations for each.
        exact: try exact inversion first, where the architecture allows it.
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
        max_steps: refuse updates of more local steps than this.
        max_images: refuse updates of more distinct images than this.
        device: where to compute: ``"auto"`` takes a GPU where there is one.
    """

    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL

    iterations: Annotated[int, Field(ge=1)] = 1000
    restarts: Annotated[int, Field(ge=1)] = 1
    orders: Annotated[int, Field(ge=1)] = 48
    exact: bool = True
    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None
    max_steps: Annotated[int, Field(ge=1)] = 16
    max_images: Annotated[int, Field(ge=1)] = 64
    device: str = "auto"

    @abstractmethod
    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """The parts of the attack for updates like this one."""

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update attacked, with ``labels`` and the ``objective``, scalar.

        Raises:
            FlprivError: if there is no honest update in ``rounds``, or an update is beyond ``max_steps`` or ``max_images``.
        """
        device = _device(self.device)
        claims: dict[int, Reconstruction] = {}
        groups: dict[object, list[tuple[int, Evidence]]] = {}
        for place, seen in enumerate(honest(capture, rounds=self.rounds, limit=self.limit, who=self.name)):
            if self.exact and (found := invert_exactly(capture, seen, rng=rng)) is not None:
                claims[place] = found
                continue
            evidence = gather(
                capture, seen, rng=rng, device=device, max_steps=self.max_steps, max_images=self.max_images, who=self.name
            )
            groups.setdefault(_alike(evidence), []).append((place, evidence))
        for members in groups.values():
            searched = self._invert([evidence for _, evidence in members], capture, rng)
            claims |= dict(zip([place for place, _ in members], searched, strict=True))
        return [claims[place] for place in sorted(claims)]

    def _invert(self, group: Sequence[Evidence], capture: Capture, rng: torch.Generator) -> list[Reconstruction]:
        first, restarts = group[0], self.restarts
        plan = self.plan(first, capture, rng=rng)
        shape = (first.site.images, *capture.task.shape)
        key, device = self._key(group), first.labels.device
        orders = [
            order
            for place, evidence in enumerate(group)
            for order in likeliest(
                evidence, orders=self.orders, wanted=restarts, shape=shape, rng=rng, what=self.name, key={**key, "place": place}
            )
        ]
        labels = torch.stack([order.labels for order in orders]).to(device)
        courses = torch.stack([order.course for order in orders]).to(device)
        problems, found = carry_out(plan, group, labels, courses=courses, shape=shape, rng=rng, what=self.name, key=key)
        return [
            self._claim(evidence, found, slice(place * restarts, (place + 1) * restarts), problems, capture, rng)
            for place, evidence in enumerate(group)
        ]

    def _claim(
        self, evidence: Evidence, found: Found, rows: slice, problems: Problems, capture: Capture, rng: torch.Generator
    ) -> Reconstruction:
        best = rows.start + int(found.objective[rows].argmin())
        plan = problems.plan
        images, labels = plan.space.decode(found.trials[best], problems.labels[best])
        return Reconstruction(
            images=plan.finish(images.detach()).clamp(0, 1).cpu(),
            round=evidence.seen.round,
            node=evidence.seen.node,
            labels=(labels.argmax(1) if labels.dim() == 2 else labels).cpu(),
            objective=found.objective[best].cpu(),
            method="search",
            sensitivity=sensitivity(evidence, capture, rng=rng),
        )

    def _key(self, group: Sequence[Evidence]) -> dict[str, str]:
        """Names a search, so that an interrupted one is taken up by its own continuation alone."""
        options = {f.name: str(getattr(self, f.name)) for f in fields(self)}
        return options | {"attack": self.name, "updates": " ".join(fingerprint(e.seen.returned) for e in group)}


def _alike(evidence: Evidence) -> object:
    """What updates share that can be matched in one computation."""
    seen, site = evidence.seen, evidence.site
    weights = None if site.class_weights is None else tuple(site.class_weights.tolist())
    return fingerprint(seen.sent), site.batches, str(site.recipe), weights, evidence.ordered, str(seen.defenses)


def _device(name: str) -> torch.device:
    return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
