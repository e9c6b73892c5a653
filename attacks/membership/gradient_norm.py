"""Gradient norm: a model has little left to learn from the records it was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen
from flpriv.attacks.membership.gradients import candidates, gradients, spread
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class GradientNorm(Attack):
    """Scores each candidate by minus the squared norm of its gradient, averaged over the trained global models.

    ``−‖∇ℓ(x; θ)‖²`` over all parameters, in eval mode, at the models after the rounds, which are those sent in the next; the
    initial model has seen nobody. One claim, about the federation: all nodes are sent the same models.

    Args:
        spread: look at no more than this many models, spread evenly, the last among them; each costs one gradient of every
            candidate.
        chunk: candidates whose gradients a GPU holds at once.
    """

    name: ClassVar[str] = "gradient-norm"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_MODELS | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Nasr et al. 2019, https://arxiv.org/abs/1812.00910"

    spread: Annotated[int, Field(ge=1)] = 5
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """One claim, scores ``(N,)`` ≤ 0; deterministic.

        Raises:
            CaptureError: for a capture without candidates or without a trained model.
            UpdateError: if a captured model is not the task's.
        """
        asked = candidates(capture, who=self.name)
        if len(capture.models) < 2:
            raise CaptureError(f"{self.name}: the capture holds no model of a round; grant 'see-models'")
        rounds = spread(range(len(capture.models) - 1, 0, -1), self.spread)
        found = []
        for round in track(rounds, self.name):
            model = frozen(capture.task, capture.models[round], who=f"{self.name}: the model after round {round}")
            found.append(gradients(model, asked, chunk=self.chunk).squares)
        return [Membership(scores=-torch.stack(found).mean(0))]
