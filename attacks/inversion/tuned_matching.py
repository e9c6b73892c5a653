"""Tuned matching: the search that does best on public images, second-order on a smoothed network where that helps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import cosine, relative
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.search import LBFGS, Adam
from flpriv.attacks.inversion.smoothing import kinks
from flpriv.attacks.inversion.tuning import shortened, tune
from flpriv.capture import Capture
from flpriv.errors import FlprivError, near


@dataclass(frozen=True, kw_only=True)
class TunedMatching(MatchingAttack):
    """Finds images by whichever search explains updates of public images best, among second-order and first-order ones.

    In the contest: L-BFGS on the relative squared distance, which is exact on shallow networks; L-BFGS on a network whose ReLUs
    are rounded off, less and less (a homotopy), which goes on where deep networks stop every other search; signed Adam as in
    inverting gradients. Each at several weights of the total variation. Judged by the distance between updates alone.

    Args:
        plan_name: take this search without a contest: ``"lbfgs"``, ``"homotopy tv=0.001"``, ``"adam tv=0.01"`` …
        simulated: updates of public images in the contest, ≥ 1.
        rungs: iterations of each round of the contest; the better half goes on.
    """

    name: ClassVar[str] = "tuned-matching"
    paper: ClassVar[str] = "after Geiping et al. 2020, https://arxiv.org/abs/2003.14053"

    plan_name: str = ""
    simulated: Annotated[int, Field(ge=1)] = 2
    rungs: tuple[int, ...] = (60, 200)

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """The winner's plan.

        Raises:
            FlprivError: for a ``plan_name`` that is not in the contest.
        """
        known = plans(smooth=kinks(evidence.site.model) > 0)
        if self.plan_name and self.plan_name not in known:
            raise FlprivError(f"{self.name}: plan_name: no search is called {self.plan_name!r}{near(self.plan_name, known)}")
        name = self.plan_name or tune(known, evidence, capture, updates=self.simulated, rungs=self.rungs, rng=rng, what=self.name)
        return shortened(known[name], self.iterations)


def plans(*, smooth: bool) -> dict[str, Plan]:
    """The searches in the contest, by name; those on a smoothed network where it has anything to smooth."""
    found = {"lbfgs": Plan(optimiser=LBFGS(), objective=relative, start=start.grey)}
    for tv in (1e-3, 1e-4) if smooth else ():
        found[f"homotopy tv={tv:g}"] = homotopy(tv, sharpness=(30, 100, 300, 1000))
    for tv in (1e-2, 1e-3):
        found[f"adam tv={tv:g}"] = Plan(optimiser=Adam(schedule="cosine"), regularisers=((tv, total_variation),))
    return found


def homotopy(tv: float, *, sharpness: Sequence[float]) -> Plan:
    """L-BFGS on ever sharper networks, then on the real one."""
    plan = Plan(objective=cosine, optimiser=LBFGS(), regularisers=((tv, total_variation),), start=start.grey, iterations=100)
    stages = [*(replace(plan, sharpness=s) for s in sharpness), plan]
    return reduce(lambda then, stage: replace(stage, then=then), reversed(stages[:-1]), stages[-1])
