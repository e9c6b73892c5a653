"""FedMIA-II: a record's gradient points along its own site's update rather than along the others'."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.membership.comparison import compared, replies
from flpriv.attacks.membership.gradients import alongside, candidates, claims
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class FedMIACosine(Attack):
    """Scores each candidate by how much better its gradient fits a client's update than the others'.

    With ``s_k = cos(∇ℓ(x; sent), sent − returned_k)``, in eval mode, the score for node k is the mean over rounds of
    ``Φ((s_k − μ) / σ)``, where μ and σ are mean and standard deviation of the OTHER clients' scores of the same record: they
    stand in for updates without it. Needs replies of at least three clients in a round; σ of two others is a poor estimate, and
    more clients make the attack sharper.

    It tells whose a record is: read the sites' findings. The federation's claim, the largest of the nodes' scores, each
    standardised, is weak by nature: of any record some client's score is the largest.

    Args:
        spread: look at no more than this many rounds, spread evenly over those with three replies or more; each costs one
            gradient of every candidate.
        trim: leave out others' scores more than this many standard deviations from their mean, as for sites whose data differ
            much; among n others none is further than ``(n−1)/√n``, so that 3 has no effect below 12 clients.
        chunk: candidates whose gradients a GPU holds at once.
    """

    name: ClassVar[str] = "fedmia-cosine"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Zhu et al. 2024, https://arxiv.org/abs/2402.06289"

    spread: Annotated[int, Field(ge=1)] = 5
    trim: Annotated[float, Field(gt=0)] | None = None
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node, scores in [0, 1]; deterministic.

        Raises:
            CaptureError: for a capture without candidates, or without usable replies of three clients in any round.
            UpdateError: if a model sent is not the task's.
        """
        candidates(capture, who=self.name)
        scores: dict[int, dict[int, Tensor]] = {}
        seen = replies(capture, most=self.spread, who=self.name)
        for found in alongside(capture, seen, chunk=self.chunk, who=self.name):
            if found.seen.node is not None:
                scores.setdefault(found.seen.round, {})[found.seen.node] = found.cosines
        return claims(compared(scores, trim=self.trim))
