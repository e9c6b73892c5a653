"""Loss threshold: records the final model fits well were trained on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen, losses
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class LossThreshold(Attack):
    """Scores each candidate by minus the final global model's cross-entropy on it: a low loss speaks for membership.

    One claim about the whole federation. The threshold is left to the measure, which walks through all of them.
    """

    name: ClassVar[str] = "loss-threshold"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Yeom et al. 2018, https://arxiv.org/abs/1709.01604"

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """One claim, scores ``(N,)`` ≤ 0 in nats; deterministic.

        Raises:
            CaptureError: for a capture without candidates.
            UpdateError: if the captured model is not the task's.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        model = frozen(capture.task, capture.final, who=f"{self.name}: the final model")
        return [Membership(scores=-losses(model, capture.candidates))]
