"""A plan carried out: one search after another, each from where the last one ended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import Problems, assemble
from flpriv.attacks.inversion.regularisers import agreement
from flpriv.attacks.inversion.search import Found


def carry_out(
    plan: Plan,
    group: Sequence[Evidence],
    labels: Tensor,
    *,
    courses: Tensor | None = None,
    shape: tuple[int, ...],
    rng: torch.Generator,
    what: str,
    key: Mapping[str, Any],
) -> tuple[Problems, Found]:
    """Where all searches of ``plan`` and of those that follow it ended.

    Args:
        plan: the first search.
        group: updates of one model and course.
        labels: ``(P, images)``, those of one update's restarts together.
        courses: ``(P, epochs, images)``; ``None`` for the same order in every epoch.
        shape: of one trial's images, ``(N, C, *spatial)``.
        rng: for first trials and noise, on the CPU.
        what: for progress.
        key: names the work in scratch space, plain data.
    """
    images = [plan.start(shape, rng).to(labels.device) for _ in labels]
    for place, stage in enumerate(plan.stages):
        trials = [stage.space.encode(one, given) for one, given in zip(images, labels, strict=True)]
        problems = assemble(group, labels, stage, courses=courses)
        restarts = len(labels) // len(group)
        found = _search(problems, torch.stack(trials), rng, restarts=restarts, what=what, key={**key, "stage": place})
        images = list(problems.images(found.trials).clamp(0, 1))
    return problems, found


def _search(
    problems: Problems, trials: Tensor, rng: torch.Generator, *, restarts: int, what: str, key: Mapping[str, Any]
) -> Found:
    plan = problems.plan
    if not plan.consensus:
        return plan.optimiser.minimise(problems, trials, iterations=plan.iterations, rng=rng, what=what, key=key)
    mean = problems.images(trials)
    drawn = replace(problems, mean=mean)

    def agree(trials: Tensor) -> None:
        mean.copy_(agreement(problems.images(trials), problems.labels, restarts=restarts))

    return plan.optimiser.minimise(drawn, trials, iterations=plan.iterations, rng=rng, what=what, key=key, each=agree)
