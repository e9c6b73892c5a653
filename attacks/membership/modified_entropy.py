"""Modified entropy: how certain the final model is of the right answer, counted over all classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen
from flpriv.attacks.membership.references import logits
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class ModifiedEntropy(Attack):
    """Scores each candidate by how sure the model is of the right answer, and how sure that the others are wrong.

    The score is ``(1 - p_y) log p_y + Σ_{i≠y} p_i log(1 - p_i)``, near 0 where the model is sure and right. One claim about the
    whole federation, from the final model alone. With two classes it ranks exactly as the loss does.
    """

    name: ClassVar[str] = "modified-entropy"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Song and Mittal 2021, https://arxiv.org/abs/2003.10595"

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """One claim, scores ``(N,)`` ≤ 0 in nats; deterministic.

        Raises:
            CaptureError: for a capture without candidates.
            UpdateError: if the captured model is not the task's.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        said = logits(frozen(capture.task, capture.final, who=f"{self.name}: the final model"), capture.candidates.images)
        classes = said.shape[1]
        own = torch.nn.functional.one_hot(capture.candidates.labels, classes).bool()
        log_p = said.log_softmax(1)
        others = said[:, None, :].expand(-1, classes, -1).masked_fill(torch.eye(classes, dtype=torch.bool), -torch.inf)
        log_not = others.logsumexp(2) - said.logsumexp(1, keepdim=True)
        terms = torch.where(own, log_not.exp() * log_p, log_p.exp() * log_not)
        return [Membership(scores=terms.sum(1))]
