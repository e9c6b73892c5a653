"""The order of the local steps where nobody grants it: orders compete, and those that explain the update best are searched."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.order import Order, Steps
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import assemble
from flpriv.attacks.inversion.search import LBFGS

_FIELD = 24
_RUNGS = (15, 30, 60)
"""Evaluations of each order still in the contest; the best third goes on."""


def likeliest(
    evidence: Evidence,
    *,
    orders: int,
    wanted: int,
    shape: tuple[int, ...],
    rng: torch.Generator,
    what: str,
    key: Mapping[str, Any],
) -> list[Order]:
    """``wanted`` orders of the images of an update, the likeliest first; from the first again where there are no more.

    Images fit themselves to a wrong order, so exchanging some that were found tells little: each order is judged by a short
    search of its own, L-BFGS on a smoothed network, and by nothing but the distance between updates. Up to 24 orders are drawn,
    all there are for four images, then the neighbours of the best until ``orders`` have been tried. The best third is searched
    for twice as long, and the best third of these again (successive halving, Jamieson and Talwalkar 2016,
    https://arxiv.org/abs/1502.07943): 32 evaluations for each order tried, 780 for the orders of four images.

    Args:
        evidence: the update.
        orders: how many to try, ≥ 1; one alone is drawn.
        wanted: ≥ 1.
        shape: ``(N, C, *spatial)``.
        rng: on the CPU.
        what: for progress.
        key: names the work in scratch space, plain data.
    """
    site, known, ordered = evidence.site, evidence.order, evidence.ordered
    if orders == 1:
        return [known.drawn(site, ordered=ordered, rng=rng) for _ in range(wanted)]
    drawn = {o.steps(site): o for o in (known.drawn(site, ordered=ordered, rng=rng) for _ in range(20 * _FIELD))}
    if len(drawn) == 1:
        return [known] * wanted
    first = start.grey(shape, rng)
    tried: dict[Steps, Order] = {}
    values: dict[Steps, float] = {}
    field = dict(islice(drawn.items(), min(_FIELD, orders)))
    while field:
        tried |= field
        values |= _judged(evidence, field, first, _RUNGS[0], f"{what}: orders", {**key, "tried": len(tried)})
        ranked = sorted(tried, key=values.__getitem__)
        field = _unseen(evidence, [tried[steps] for steps in ranked], tried, min(_FIELD // 2, orders - len(tried)), rng)
    count = len(ranked)
    for iterations in _RUNGS[1:]:
        if (count := -(-count // 3)) == 1:
            break
        best = ranked[:count]
        again = _judged(evidence, {s: tried[s] for s in best}, first, iterations, f"{what}: orders", {**key, "rung": iterations})
        ranked = [*sorted(best, key=again.__getitem__), *ranked[count:]]
    return [tried[ranked[place % len(ranked)]] for place in range(wanted)]


def _judged(
    evidence: Evidence,
    field: Mapping[Steps, Order],
    first: torch.Tensor,
    iterations: int,
    what: str,
    key: Mapping[str, Any],
) -> dict[Steps, float]:
    """How far from the update the best images found for each order remain."""
    plan = Plan(optimiser=LBFGS(), objective=relative, sharpness=30)
    device = evidence.labels.device
    labels, courses = (torch.stack([getattr(o, name) for o in field.values()]).to(device) for name in ("labels", "course"))
    problems = assemble([evidence], labels, plan, courses=courses)
    trials = first.to(device).expand(len(field), *first.shape)
    found = plan.optimiser.minimise(problems, trials, iterations=iterations, rng=torch.Generator(), what=what, key=key)
    return dict(zip(field, found.objective.tolist(), strict=True))


def _unseen(
    evidence: Evidence, ranked: Sequence[Order], tried: Mapping[Steps, Order], most: int, rng: torch.Generator
) -> dict[Steps, Order]:
    """Up to ``most`` orders not tried yet next to the best one that has any."""
    for order in ranked if most else ():
        near = {o.steps(evidence.site): o for o in order.neighbours(evidence.site, ordered=evidence.ordered)}
        new = [steps for steps in near if steps not in tried]
        if new:
            chosen = torch.randperm(len(new), generator=rng)[:most].tolist()
            return {new[place]: near[new[place]] for place in chosen}
    return {}
