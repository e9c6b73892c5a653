"""Empirical lower bounds on epsilon, each beside the most its test could have shown and what the defence claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flpriv.claim import PrivacyBound
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Metric
from flpriv.measures.bounds import Cap, ceiling, clopper_pearson_bound, gdp_bound, one_run, rates
from flpriv.measures.membership import auc, auc_interval, roc
from flpriv.truth import Claimed, Truth

Floats = NDArray[np.float64]
AREA, ALLOWED = "AUC of canaries", "largest AUC allowed"


def findings(claims: Sequence[PrivacyBound], truth: Truth, new: Callable[..., Finding]) -> list[Finding]:
    """One finding: what the coins of the canaries say of the scores.

    The headline is the bound from one run, at the δ of the claimed epsilon where there is one. It stands beside its ceiling, two
    bounds that assume more (independent canaries; a Gaussian mechanism besides), and the AUC of the canaries, with the largest
    AUC that a Gaussian mechanism of the claimed epsilon allows.

    Several claims share the error: each is tested at a confidence that holds for all of them together, and the largest is shown.

    Raises:
        ClaimError: for scores of the wrong number or with NaN, or where it is not known which canaries were in.
    """
    if truth.planted is None:
        raise ClaimError("the bound cannot be measured: it is not known which canaries were in")
    included = truth.planted.included.numpy().astype(bool)
    kept = [truth.claimed[site] for site in truth.planted.sites if site in truth.claimed]
    claimed = max(kept, key=lambda claim: claim.epsilon, default=None)
    found = [_finding(_checked(claim, len(included)), included, claim, claimed, len(claims), new) for claim in claims]
    best = max(range(len(found)), key=lambda place: (found[place].headline or _NOTHING).value or 0.0)
    return [found[best]]


_NOTHING = Metric(name="", value=None)


def _finding(
    scores: Floats,
    included: NDArray[np.bool_],
    claim: PrivacyBound,
    claimed: Claimed | None,
    tests: int,
    new: Callable[..., Finding],
) -> Finding:
    n, inside = len(included), int(included.sum())
    confidence = 1 - (1 - claim.confidence) / tests
    delta = claim.delta if claimed is None else claimed.delta
    test = f"{confidence:.0%} confidence, delta {delta:g}"
    most = ceiling(n, delta=delta, confidence=confidence)
    bound = one_run(scores, included, delta=delta, confidence=confidence)
    epsilon = None if claimed is None else claimed.epsilon
    headline = Metric(
        name="epsilon, lower bound",
        value=bound,
        low=bound,
        n=n,
        null=epsilon,
        null_name="" if epsilon is None else "claimed epsilon",
        note=test,
    )
    metrics = [
        headline,
        Metric(name="ceiling of the test", value=most, n=n, note="no leakage however large could have shown more"),
    ]
    caveats = []
    if 0 < inside < n:
        metrics += _assuming(scores, included, claimed, delta=delta, confidence=confidence)
    if tests > 1:
        caveats.append(f"The largest of {tests} bounds is shown, each at {confidence:.1%} confidence so that all hold together.")
    if epsilon is not None and bound > epsilon:
        caveats.append(f"The measured bound {bound:.2f} exceeds the claimed {epsilon:.2f}: the claim is wrong.")
    if epsilon is not None and most < epsilon:
        caveats.append(f"{n} canaries cannot show more than {most:.2f}, less than the claimed {epsilon:.2f}.")
    area, allowed = (next((metric for metric in metrics if metric.name == name), _NOTHING) for name in (AREA, ALLOWED))
    if area.low is not None and allowed.value is not None and area.low > allowed.value:
        caveats.append(
            "Canaries are surely told better than a Gaussian mechanism of the claimed epsilon allows; doubt the claim."
        )
    if not most:
        caveats.append(f"{n} canaries at delta {delta:g} show nothing whatever happens: use fewer, or a smaller delta.")
    curve = roc(scores, included) if 0 < inside < n else None
    return new(headline=headline, metrics=tuple(metrics), caveats=tuple(caveats), roc=curve)


def _assuming(
    scores: Floats, included: NDArray[np.bool_], claimed: Claimed | None, *, delta: float, confidence: float
) -> list[Metric]:
    """What rests on more than differential privacy and coins."""
    n = len(included)
    cap = None if claimed is None else Cap.of(claimed.epsilon, delta=claimed.delta)
    low, high = auc_interval(scores, included)
    allowed = "" if cap is None else f"a Gaussian mechanism of the claimed epsilon allows {cap.auc:.3f}"
    metrics = [
        Metric(
            name="epsilon, Clopper-Pearson",
            value=clopper_pearson_bound(rates(scores, included, by="epsilon", confidence=confidence), delta=delta),
            n=n // 2,
            note="takes the canaries of one run as independent",
        ),
        Metric(
            name="epsilon, Gaussian",
            value=gdp_bound(rates(scores, included, by="mu", confidence=confidence), delta=delta),
            n=n // 2,
            note="takes the canaries as independent and the mechanism as Gaussian: no proof against a claim",
        ),
        Metric(
            name=AREA,
            value=auc(scores, included),
            low=low,
            high=high,
            n=n,
            null=0.5,
            null_name="chance",
            note=allowed,
        ),
    ]
    if cap is not None:
        metrics.append(Metric(name=ALLOWED, value=cap.auc, note="by a Gaussian mechanism of the claimed epsilon"))
    return metrics


def _checked(claim: PrivacyBound, n: int) -> Floats:
    scores: Floats = claim.scores.detach().to("cpu", dtype=claim.scores.dtype).double().numpy()
    if scores.shape != (n,):
        raise ClaimError(f"privacy bound: {scores.shape} scores for {n} canaries; give one score per canary")
    if np.isnan(scores).any():
        raise ClaimError(f"privacy bound: {int(np.isnan(scores).sum())} of {n} scores are NaN; give each canary a number")
    return scores
