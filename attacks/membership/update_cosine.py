"""Update cosine: a site's update points along the gradients of the records it trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.membership.gradients import alongside, candidates, claims, usable
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class UpdateCosine(Attack):
    """Scores each candidate by the cosine between its own gradient at the model sent and the update that came back.

    For a record x and a node, ``cos(∇ℓ(x; sent), sent − returned)`` is averaged over the node's observations: the claim about the
    node. The claim about the federation is the largest of the nodes' scores, each standardised over the candidates. Gradients are
    taken in eval mode. Messages that carried a trap and updates that are zero or not finite are left out.

    Args:
        spread: look at no more than this many rounds, spread evenly over those seen; each costs one gradient of every candidate.
        chunk: candidates whose gradients a GPU holds at once.
    """

    name: ClassVar[str] = "update-cosine"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Li et al. 2022, https://arxiv.org/abs/2202.12967"

    spread: Annotated[int, Field(ge=1)] = 5
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node, scores in [-1, 1]; deterministic.

        Where only sums over clients are seen there is the claim about the federation alone.

        Raises:
            CaptureError: for a capture without candidates or without a usable update.
            UpdateError: if a model sent is not the task's.
        """
        candidates(capture, who=self.name)
        scores: dict[int | None, list[Tensor]] = {}
        seen = usable(capture, most=self.spread, who=self.name)
        for found in alongside(capture, seen, chunk=self.chunk, who=self.name):
            scores.setdefault(found.seen.node, []).append(found.cosines)
        return claims(scores)
