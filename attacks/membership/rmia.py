"""RMIA, the robust membership inference attack: is the model surer of this record than of people it has never seen?"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attacks.membership.references import Answers, ReferenceAttack, mean_out
from flpriv.errors import CaptureError, ScenarioError
from flpriv.threat import Can

TIE = 1e-7
"""What LR(x) adds to a share, at most: less than one public image in a million counts."""


@dataclass(frozen=True, kw_only=True)
class RMIA(ReferenceAttack):
    """Scores each candidate by the share of public images it beats in how much surer the model is of it than others are.

    Public images z count where ``LR(x) / LR(z) > γ``. ``LR(x) = p(x; final) / p(x)``, where ``p(x)`` is what models make of x on
    average. Offline it is estimated from those that were not trained on x, as ``½ ((1 + a) mean_out + 1 - a)``; online it is
    the mean of those with and those without x. Of a public image only models without it count, for the attacked one is without
    it too: the plain mean (online) or the same estimate (offline). Few public images, or a model that is sure of nothing, make
    many ties; LR(x) itself, of which the share is a staircase, breaks them. One claim about the whole federation.

    Args:
        online: use the shadows that were trained on the record too.
        a: models trained on a record are taken to say ``a p + 1 - a`` where the others say ``p``, in [0, 1].
        gamma: by what factor a record must beat a public image, > 0.
        temperature: of the softmax, > 0.
    """

    name: ClassVar[str] = "rmia"
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_CANDIDATES | Can.KNOW_PUBLIC
    paper: ClassVar[str] = "Zarifzadeh et al. 2024, https://arxiv.org/abs/2312.03262"

    online: bool = False
    a: Annotated[float, Field(ge=0, le=1)] = 0.33
    gamma: Annotated[float, Field(gt=0)] = 2.0
    temperature: Annotated[float, Field(gt=0)] = 2.0

    def score(self, candidates: Answers, public: Answers | None) -> Tensor:
        """A share in [0, 1], ties broken.

        Raises:
            CaptureError: without public images, or if every shadow was trained on one of them.
            ScenarioError: for the online attack with shadows on public images alone.
        """
        if public is None:
            raise CaptureError("rmia: compares with public images, and the capture holds none; set sites.split.public > 0")
        if self.online and not bool(candidates.inside.any()):
            raise ScenarioError("rmia: online = true needs shadows trained on candidates; set pool = 'candidates'")
        usable = ~public.inside.all(0)
        if not bool(usable.any()):
            raise CaptureError("rmia: every shadow was trained on every public image; set pool = 'candidates'")
        own, other = (answers.probability(temperature=self.temperature) for answers in (candidates, public))
        asked = own[0] / self._expected(own[1:], candidates.inside, asked=True)
        ratios = (other[0] / self._expected(other[1:], public.inside, asked=False))[usable]
        share = torch.searchsorted(ratios.sort().values, asked / self.gamma).double() / len(ratios)
        return share + TIE * asked / (1 + asked)

    def _expected(self, probability: Tensor, inside: Tensor, *, asked: bool) -> Tensor:
        out = mean_out(probability, inside)
        if not self.online:
            return ((1 + self.a) * out + 1 - self.a) / 2
        return (out + mean_out(probability, ~inside)) / 2 if asked else out
