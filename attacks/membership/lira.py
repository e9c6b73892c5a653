"""LiRA, the likelihood ratio attack: is this confidence one of a model that saw the record, or one of a model that did not?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attacks.membership.references import Answers, ReferenceAttack
from flpriv.errors import ScenarioError

FEW = 64
"""Below this many shadows one standard deviation is taken for all records."""


@dataclass(frozen=True, kw_only=True)
class LiRA(ReferenceAttack):
    """Fits a normal distribution to the confidences φ = log p_y - log(1 - p_y) of the shadows, for each record.

    Offline: ``log Φ((φ - μ_out) / σ_out)`` of the shadows that were not trained on the record. Online:
    ``log N(φ; μ_in, σ_in) - log N(φ; μ_out, σ_out)``. Below 64 shadows one σ serves all records, pooled over deviations from
    each record's own mean. One claim about the whole federation.

    Args:
        shadows: reference models, even; 16 tell little apart beyond the mean, hundreds are the published attack.
        online: use the shadows that were trained on the record too.
    """

    name: ClassVar[str] = "lira"
    paper: ClassVar[str] = "Carlini et al. 2022, https://arxiv.org/abs/2112.03570"

    shadows: Annotated[int, Field(ge=4, multiple_of=2)] = 16
    online: bool = False

    def score(self, candidates: Answers, public: Answers | None) -> Tensor:
        """Log likelihood (ratio), larger means more likely a member.

        Raises:
            ScenarioError: for the online attack with shadows on public images alone.
        """
        if self.online and not bool(candidates.inside.any()):
            raise ScenarioError("lira: online = true needs shadows trained on candidates; set pool = 'candidates'")
        confidence = candidates.confidence()
        mean, deviation = _normal(confidence[1:], ~candidates.inside)
        if not self.online:
            likelihood: Tensor = torch.special.log_ndtr((confidence[0] - mean) / deviation)
            return likelihood
        mean_in, deviation_in = _normal(confidence[1:], candidates.inside)
        return _log_density(confidence[0], mean_in, deviation_in) - _log_density(confidence[0], mean, deviation)


def _normal(values: Tensor, among: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation ``(N,)`` of those of ``(R, N)`` values that are ``among``."""
    counts = among.sum(0)
    mean = (values * among).sum(0) / counts
    squares = ((values - mean).square() * among).sum(0)
    variance = squares / (counts - 1) if len(values) >= FEW else (squares.sum() / (counts - 1).sum()).expand_as(mean)
    return mean, variance.sqrt().clamp_min(1e-12)


def _log_density(value: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    return -((value - mean) / deviation).square() / 2 - deviation.log()
