"""What an attack asserts. Claims know nothing of the truth; measures bring the two together."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from torch import Tensor


class Goal(StrEnum):
    """What an attack is after; decides the measure."""

    RECONSTRUCTION = "reconstruction"
    MEMBERSHIP = "membership"
    ATTRIBUTE = "attribute"
    PRIVACY_BOUND = "privacy-bound"


@dataclass(frozen=True, kw_only=True)
class Reconstruction:
    """Images said to be among the records behind one update.

    Args:
        images: ``(N, C, *spatial)`` float in [0, 1]; N may differ from the true number.
        round: of the observation.
        node: pseudonym, or ``None`` for claims about a sum over clients.
        labels: ``(N,)`` int64, where the attack tells them.
        confidence: ``(N,)``, larger is surer, where the attack tells it.
        objective: ``(N,)`` or scalar final value of the attack's own objective, lower is better; selection goes by this alone.
        method: how the images were found where the attack has more than one way, for the report (``"exact: dense + ReLU"``).
        sensitivity: ``1 - cos`` between the update and what images of other people would send at the same labels, in [0, 2];
            near 0 the update hardly depends on the images. ``None`` where the adversary has no public images to tell it by.
    """

    images: Tensor
    round: int
    node: int | None
    labels: Tensor | None = None
    confidence: Tensor | None = None
    objective: Tensor | None = None
    method: str = ""
    sensitivity: float | None = None


@dataclass(frozen=True, kw_only=True)
class Membership:
    """A score for each of the capture's candidates.

    Args:
        scores: ``(N,)`` float64, larger means more likely a member.
        node: ``None`` for membership in the federation, else in that node's training set.
    """

    scores: Tensor
    node: int | None = None


@dataclass(frozen=True, kw_only=True)
class Attribute:
    """A guess of one attribute of each of the capture's candidates.

    Args:
        attribute: ``"site"``, ``"sex"``, ``"age"``, …; ``"source"`` for the client that a record was trained on by.
        classes: names of the guessed values; pseudonyms of nodes where the attribute is ``"source"``.
        probabilities: ``(N, len(classes))``, rows sum to 1.
        probe: what made the guess (``"logistic probe"``, ``"head"``).
        baseline: empty for the attack itself; else the name of the baseline this claim is (``"untrained backbone"``).
        repeat: index of the repetition (seed).
    """

    attribute: str
    classes: tuple[str, ...]
    probabilities: Tensor
    probe: str
    baseline: str = ""
    repeat: int = 0


@dataclass(frozen=True, kw_only=True)
class Property:
    """A guess whether more than a share of the records behind one update have a property.

    Args:
        property: ``"sex=F"``, ``"age>=60"``, …, as :func:`flpriv.property.has` reads it.
        share: in [0, 1); 0 asks whether any record has it, .5 whether most have.
        round: of the observation.
        node: pseudonym.
        probability: in [0, 1], that it is so.
    """

    property: str
    share: float
    round: int
    node: int
    probability: float


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """An estimate of one numeric attribute of each of the capture's candidates.

    Args:
        attribute: ``"age"``.
        values: ``(N,)`` float64 in the attribute's own unit (years).
        probe: what made the estimate (``"ridge regression"``, ``"head"``).
        baseline: empty for the attack itself; else the name of the baseline this claim is (``"mean age"``).
        repeat: index of the repetition (seed).
    """

    attribute: str
    values: Tensor
    probe: str
    baseline: str = ""
    repeat: int = 0


@dataclass(frozen=True, kw_only=True)
class PrivacyBound:
    """A score for each of the capture's canaries; what epsilon they prove is for the measure to say, which knows the coins.

    Args:
        scores: ``(m,)`` float64, larger means more likely in.
        delta: at which the bound is said where no defence claims an epsilon at another, in (0, 1).
        confidence: of the bound, e.g. .95.
    """

    scores: Tensor
    delta: float = 1e-5
    confidence: float = 0.95


Claim = Reconstruction | Membership | Attribute | Estimate | Property | PrivacyBound
