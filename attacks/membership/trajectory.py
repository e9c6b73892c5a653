"""Trajectory: a record that was trained on is fitted early and stays fitted, round after round."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen, losses
from flpriv.attacks.membership.gradients import candidates, gradients, spread
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.state import difference
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class Trajectory(Attack):
    """Scores each candidate by the mean over rounds of what the global models say of it; sums over clients are enough.

    With ``score = "loss"`` the mean of ``−ℓ(x; θ_t)`` over the models after the rounds; with ``"cosine"`` that of
    ``cos(∇ℓ(x; θ_t), θ_t − θ_{t+1})``, along the federation's own steps. One claim, about the federation. In eval mode.

    Args:
        score: which of the two; the cosine costs a gradient of every candidate a round.
        spread: look at no more than this many rounds, spread evenly, the last among them.
        chunk: candidates whose gradients a GPU holds at once.
    """

    name: ClassVar[str] = "trajectory"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_MODELS | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Zari et al. 2021, https://arxiv.org/abs/2111.00430"

    score: Literal["loss", "cosine"] = "loss"
    spread: Annotated[int, Field(ge=1)] = 20
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """One claim, scores ``(N,)``: ≤ 0 in nats, or in [-1, 1]; deterministic.

        Raises:
            CaptureError: for a capture without candidates or without a trained model.
            UpdateError: if a captured model is not the task's.
        """
        candidates(capture, who=self.name)
        if len(capture.models) < 2:
            raise CaptureError(f"{self.name}: the capture holds no model of a round; grant 'see-models'")
        rounds = spread(range(len(capture.models) - 1, 0, -1), self.spread)
        found = [self._scores(capture, round) for round in track(rounds, self.name)]
        return [Membership(scores=torch.stack(found).mean(0))]

    def _scores(self, capture: Capture, round: int) -> Tensor:
        asked, after, before = candidates(capture, who=self.name), capture.models[round], capture.models[round - 1]
        if self.score == "loss":
            return -losses(frozen(capture.task, after, who=f"{self.name}: the model after round {round}"), asked)
        model = frozen(capture.task, before, who=f"{self.name}: the model before round {round}")
        return gradients(model, asked, [difference(before, after)], chunk=self.chunk).cosines[:, 0]
