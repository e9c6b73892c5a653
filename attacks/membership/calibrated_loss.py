"""Calibrated loss: how much better the final model fits a record than models that never saw it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from flpriv.attacks.membership.references import Answers, ReferenceAttack, mean_out


@dataclass(frozen=True, kw_only=True)
class CalibratedLoss(ReferenceAttack):
    """Scores each candidate by the mean loss of the reference models that were not trained on it, minus the final model's loss.

    A record that is easy for every model is no longer taken for a member. One claim about the whole federation.
    """

    name: ClassVar[str] = "calibrated-loss"
    paper: ClassVar[str] = "Watson et al. 2022, https://arxiv.org/abs/2111.08440"

    def score(self, candidates: Answers, public: Answers | None) -> Tensor:
        """``mean_out ℓ(x; reference) - ℓ(x; final)`` in nats."""
        losses = candidates.losses()
        return mean_out(losses[1:], candidates.inside) - losses[0]
