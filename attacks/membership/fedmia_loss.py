"""FedMIA-I: a site's own model fits the site's own records better than the other sites' models do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen, losses
from flpriv.attacks.membership.comparison import compared, replies
from flpriv.attacks.membership.gradients import candidates, claims
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.progress import track
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class FedMIALoss(Attack):
    """Scores each candidate by how much lower its loss is under a client's returned model than under the others'.

    With ``s_k = −ℓ(x; returned_k)``, in eval mode, the score for node k is the mean over rounds of ``Φ((s_k − μ) / σ)``, where μ
    and σ are mean and standard deviation of the OTHER clients' scores of the same record: they stand in for models that have not
    seen it. Needs replies of at least three clients in a round; σ of two others is a poor estimate, and more clients make the
    attack sharper.

    It tells whose a record is: read the sites' findings. The federation's claim, the largest of the nodes' scores, each
    standardised, is weak by nature: of any record some client's score is the largest.

    Args:
        spread: look at no more than this many rounds, spread evenly over those with three replies or more.
        trim: leave out others' scores more than this many standard deviations from their mean, as for sites whose data differ
            much; among n others none is further than ``(n−1)/√n``, so that 3 has no effect below 12 clients.
    """

    name: ClassVar[str] = "fedmia-loss"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Zhu et al. 2024, https://arxiv.org/abs/2402.06289"

    spread: Annotated[int, Field(ge=1)] = 20
    trim: Annotated[float, Field(gt=0)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node, scores in [0, 1]; deterministic.

        Raises:
            CaptureError: for a capture without candidates, or without usable replies of three clients in any round.
            UpdateError: if a model returned is not the task's.
        """
        asked = candidates(capture, who=self.name)
        scores: dict[int, dict[int, Tensor]] = {}
        for seen in track(replies(capture, most=self.spread, who=self.name), self.name):
            if seen.node is not None:
                model = frozen(
                    capture.task, seen.returned, who=f"{self.name}: the reply of node {seen.node} in round {seen.round}"
                )
                scores.setdefault(seen.round, {})[seen.node] = -losses(model, asked)
        return claims(compared(scores, trim=self.trim))
