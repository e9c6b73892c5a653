"""Settings of a search, chosen on updates of public images before any update of a patient is attacked."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace

import torch
from torch import Tensor

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.simulation import simulate
from flpriv.cache import recall
from flpriv.capture import Capture
from flpriv.state import fingerprint


def tune(
    plans: Mapping[str, Plan],
    evidence: Evidence,
    capture: Capture,
    *,
    updates: int,
    rungs: Sequence[int],
    rng: torch.Generator,
    what: str,
) -> str:
    """The name of the plan whose searches on public images end nearest to the updates they were to explain.

    Every plan attacks the same simulated updates; the better half goes on to the next rung with more iterations (successive
    halving, Jamieson and Talwalkar 2016, https://arxiv.org/abs/1502.07943). Judged by the cosine distance between updates alone,
    without any regulariser. Without public images the first plan is taken. Remembered for the model sent, the recipe, the
    defences and the plans (:mod:`flpriv.cache`).

    Args:
        plans: by name, the likeliest first.
        evidence: whose site is simulated.
        capture: with public images.
        updates: how many are simulated, ≥ 1.
        rungs: iterations of each round of the contest.
        rng: draws the seed of the simulation.
        what: for progress.
    """
    names = list(plans)
    if capture.public is None or not len(capture.public) or len(names) == 1:
        return names[0]
    seed = int(torch.randint(2**31, (), generator=rng))

    def contest() -> dict[str, Tensor]:
        left = names
        for rung in rungs:
            scores = {name: _score(shortened(plans[name], rung), evidence, capture, updates, seed, what) for name in left}
            left = sorted(left, key=scores.__getitem__)[: max(1, len(left) // 2)]
        return {"choice": torch.tensor(names.index(left[0]))}

    key = {
        "plans": [(name, _words(plan)) for name, plan in plans.items()],
        "task": json.dumps(asdict(capture.task), default=str),
        "sent": fingerprint(evidence.seen.sent),
        "recipe": str(evidence.site.recipe),
        "batches": evidence.site.batches,
        "defenses": str(evidence.seen.defenses),
        "public": fingerprint({"images": capture.public.images}),
        "contest": [updates, list(rungs)],
    }
    return names[int(recall("tuning", key, contest)["choice"])]


def shortened(plan: Plan, iterations: int) -> Plan:
    """``plan`` with its searches shrunk to ``iterations`` in all."""
    return _scaled(plan, iterations / sum(stage.iterations for stage in plan.stages))


def _scaled(plan: Plan, share: float) -> Plan:
    then = _scaled(plan.then, share) if plan.then is not None else None
    return replace(plan, iterations=max(1, round(plan.iterations * share)), then=then)


def _score(plan: Plan, evidence: Evidence, capture: Capture, updates: int, seed: int, what: str) -> float:
    """Mean cosine distance over the same simulated updates for every plan."""
    rng = torch.Generator().manual_seed(seed)
    return float(simulate(plan, evidence, capture, updates=updates, rng=rng, what=f"{what}: tuning").mismatch.mean())


def _words(plan: Plan) -> str:
    """A plan as text that is the same in every process: functions by name and where they stand."""

    def word(value: object) -> str:
        if isinstance(value, Plan):
            return _words(value)
        if isinstance(value, tuple):
            return f"({', '.join(map(word, value))})"
        return _name(value) if callable(value) and not isinstance(value, type) and hasattr(value, "__qualname__") else str(value)

    return ", ".join(f"{field}={word(getattr(plan, field))}" for field in Plan.__dataclass_fields__ if field != "finish")


def _name(function: Callable[..., object]) -> str:
    return f"{function.__module__}.{function.__qualname__}"
