"""Membership: tie-aware AUC, ROC from corner to corner, TPR at low FPR, all against chance."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray

from flpriv.bands import band, bands
from flpriv.claim import Membership
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Group, Metric, Roc
from flpriv.measures.bounds import Cap
from flpriv.measures.intervals import Interval, clopper_pearson
from flpriv.measures.shares import share_interval
from flpriv.records import Records
from flpriv.truth import Truth

Floats = NDArray[np.float64]

LOW_FPR = ((0.01, 100), (0.001, 1000))
"""False positive rates that are reported, and the non-members each needs."""
FEW = 100
"""With fewer members or non-members than this, a caveat tells the standard error."""
GROUP = 10
"""Members and non-members a group of people needs for an AUC of its own."""
AGES = (40, 60, 80)
"""Years at which a new age band begins."""


def roc(scores: ArrayLike, members: ArrayLike) -> Roc:
    """The ROC curve from (0, 0) to (1, 1); equal scores move together, so ties make diagonal steps.

    Args:
        scores: ``(N,)``, larger means member.
        members: ``(N,)`` bool, with at least one member and one non-member.
    """
    score, member = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=bool)
    order = np.argsort(-score, kind="stable")
    ranked = score[order]
    last = np.append(ranked[1:] != ranked[:-1], True)
    hits, misses = np.cumsum(member[order])[last], np.cumsum(~member[order])[last]
    return Roc(fpr=np.append(0.0, misses / misses[-1]), tpr=np.append(0.0, hits / hits[-1]))


def auc(scores: ArrayLike, members: ArrayLike) -> float:
    """Area under the ROC curve: P(member above non-member) + ½ P(tie), in [0, 1]."""
    score, member = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=bool)
    return float(_above(score[member], score[~member]).mean())


def auc_interval(scores: ArrayLike, members: ArrayLike, patients: Sequence[str] = (), *, level: float = 0.95) -> Interval:
    """Interval of the AUC by DeLong's variance, with the images of a patient counted as one cluster.

    With an AUC of exactly 0 or 1 that variance is 0; then the exact binomial bound for the smaller side's patients is given.

    Papers: DeLong et al. 1988; clusters by Obuchowski 1997.
    """
    from scipy.stats import norm

    score, member = np.asarray(scores, dtype=np.float64), np.asarray(members, dtype=bool)
    groups = np.asarray(patients) if len(patients) else np.arange(len(score))
    area = auc(score, member)
    sides = (
        (_above(score[member], score[~member]), groups[member]),
        (1 - _above(score[~member], score[member]), groups[~member]),
    )
    fewest = min(len(np.unique(of)) for _, of in sides)
    if area in (0.0, 1.0) or fewest < 2:
        return clopper_pearson(area * fewest, fewest, level=level)
    half = float(norm.ppf((1 + level) / 2)) * math.sqrt(sum(_mean_variance(placed - area, of) for placed, of in sides))
    return max(0.0, area - half), min(1.0, area + half)


def null_error(members: int, others: int) -> float:
    """Standard error of the AUC of scores that know nothing: ``sqrt((m + n + 1) / (12 m n))``."""
    return math.sqrt((members + others + 1) / (12 * members * others))


def tpr_at(curve: Roc, fpr: float) -> float:
    """The largest true positive rate of any threshold whose false positive rate is at most ``fpr``."""
    return float(curve.tpr[curve.fpr <= fpr].max())


def findings(claims: Sequence[Membership], truth: Truth, new: Callable[..., Finding]) -> list[Finding]:
    """One finding over the federation, then one per site.

    Over the federation the members are what any site trained on, and the score is the claim about the federation; an attack that
    makes claims about nodes alone is scored by their maximum, each standardised. At a site its members stand against its own
    non-members, so that telling sites apart is not taken for telling members; there the score is the claim about the site's own
    node where there is one, else the one about the federation. The finding over the federation tells the same among the people of
    each sex and age band that occurs.

    Raises:
        ClaimError: for scores of the wrong number or with NaN.
    """
    if truth.members is None:
        raise ClaimError("membership cannot be measured: it is not known which candidates were trained on")
    member = truth.members.numpy().astype(bool)
    nodes: dict[int, Floats] = {}
    federation: Floats | None = None
    for claim in claims:
        scores = _checked(claim, len(member))
        if claim.node is None:
            federation = scores if federation is None else federation
        else:
            nodes[claim.node] = scores
    if federation is None:
        federation = np.max([_standard(scores) for scores in nodes.values()], axis=0)
    known = truth.candidates
    patients = np.asarray(known.patients if known and known.patients else [str(i) for i in range(len(member))])
    labels = known.labels.numpy() if known else np.zeros(len(member), dtype=np.int64)
    overall = _finding(federation, member, labels, patients, new, site="")
    overall = _capped(overall, truth)
    found = [replace(overall, groups=_groups(federation, member, patients, known) if known else ())]
    site = np.asarray(known.attributes.get("site", ()) if known else ())
    own = {truth.site_of[node]: scores for node, scores in nodes.items() if node in truth.site_of}
    for name in sorted(set(site.tolist()) - {""}):
        here = site == name
        scores = own.get(name, federation)[here]
        found.append(_finding(scores, member[here], labels[here], patients[here], new, site=name))
    return found


def _finding(
    scores: Floats,
    member: NDArray[np.bool_],
    labels: NDArray[np.int64],
    patients: NDArray[np.str_],
    new: Callable[..., Finding],
    *,
    site: str,
) -> Finding:
    hits, misses = int(member.sum()), int((~member).sum())
    n = hits + misses
    if not hits or not misses:
        missing = Metric(name="AUC", value=None, n=n, null=0.5, null_name="chance", note=f"{hits} members, {misses} non-members")
        return new(
            site=site, headline=missing, metrics=(missing,), caveats=(f"There are {hits} members and {misses} non-members.",)
        )
    curve, headline = roc(scores, member), _area(scores, member, patients)
    error = null_error(hits, misses)
    best = float((curve.tpr + 1 - curve.fpr).max() / 2)
    balanced = Metric(
        name="balanced accuracy",
        value=best,
        n=n,
        null=0.5,
        null_name="chance",
        note="at the threshold that is best on these very candidates: optimistic",
    )
    caveats = []
    if min(hits, misses) < FEW:
        caveats.append(f"Only {hits} members and {misses} non-members: guessing alone gives an AUC of 0.5 ± {2 * error:.2f}.")
    if _labels_differ(labels, member):
        caveats.append(
            "Members and non-members differ in their class shares: part of the AUC, in either direction, may be the label."
        )
    rates = tuple(_low_fpr(scores, member, patients, fpr, needed) for fpr, needed in LOW_FPR)
    return new(site=site, headline=headline, metrics=(headline, *rates, balanced), roc=curve, caveats=tuple(caveats))


def _labels_differ(labels: NDArray[np.int64], member: NDArray[np.bool_]) -> bool:
    """Whether class shares of the two sides differ by more than chance, chi-squared at 1 %."""
    from scipy.stats import chi2_contingency

    counts = np.array([[np.sum(labels[side] == c) for c in np.unique(labels)] for side in (member, ~member)])
    return counts.shape[1] > 1 and float(chi2_contingency(counts).pvalue) < 0.01


def _capped(finding: Finding, truth: Truth) -> Finding:
    """The finding beside the AUC that the largest epsilon claimed by a site allows, where every site claims one."""
    sites = set(truth.site_of.values())
    if not sites or not sites <= truth.claimed.keys():
        return finding
    caps = {site: Cap.of(truth.claimed[site].epsilon, delta=truth.claimed[site].delta) for site in sites}
    site = max(caps, key=lambda name: caps[name].mu)
    claim = truth.claimed[site]
    note = f"by a Gaussian mechanism of the claimed epsilon {claim.epsilon:.2f} at delta {claim.delta:g}"
    cap = Metric(name="largest AUC allowed", value=caps[site].auc, note=note)
    area = finding.headline
    exceeded = area is not None and area.low is not None and area.low > caps[site].auc
    doubt = ("Members are surely told better than the claimed epsilon allows; doubt the claim.",) if exceeded else ()
    return replace(finding, metrics=(*finding.metrics, cap), caveats=(*finding.caveats, *doubt))


def _area(scores: Floats, member: NDArray[np.bool_], patients: NDArray[np.str_]) -> Metric:
    hits, misses = int(member.sum()), int((~member).sum())
    low, high = auc_interval(scores, member, patients.tolist())
    note = f"standard error at chance {null_error(hits, misses):.3f}"
    value = auc(scores, member)
    return Metric(name="AUC", value=value, low=low, high=high, n=hits + misses, null=0.5, null_name="chance", note=note)


def _low_fpr(scores: Floats, member: NDArray[np.bool_], patients: NDArray[np.str_], fpr: float, needed: int) -> Metric:
    """The true positive rate at one false positive rate; the images of a patient do not count as independent."""
    name, misses = f"TPR at {100 * fpr:g} % FPR", int((~member).sum())
    if misses < needed or misses == len(member):
        note = f"needs {needed} non-members, there are {misses}" if misses < needed else "no members"
        return Metric(name=name, value=None, n=misses, null=fpr, null_name="chance", note=note)
    # The threshold is the score above which no more than that share of the non-members lies.
    above = np.sort(scores[~member])[::-1][math.floor(fpr * misses + 1e-9)]
    found = scores[member] > above
    low, high = share_interval(found, patients[member].tolist())
    return Metric(name=name, value=float(found.mean()), low=low, high=high, n=found.size, null=fpr, null_name="chance")


def _groups(scores: Floats, member: NDArray[np.bool_], patients: NDArray[np.str_], known: Records) -> tuple[Group, ...]:
    """Each sex and age band that occurs, among its own people; a group too small reads n/a."""
    names = bands(AGES)
    ages = [band(age, names) for age in known.attributes.get("age", ())]
    columns = {"sex": list(known.attributes.get("sex", ())), "age": ages}
    found = []
    for attribute, column in columns.items():
        for value in [name for name in names if name in column] if attribute == "age" else sorted(set(column) - {""}):
            here = np.asarray(column) == value
            hits, misses = int((member & here).sum()), int((~member & here).sum())
            area = Metric(name="AUC", value=None, n=hits + misses, note=f"needs {GROUP} members and non-members")
            if min(hits, misses) >= GROUP:
                area = _area(scores[here], member[here], patients[here])
            strict = _low_fpr(scores[here], member[here], patients[here], *LOW_FPR[0])
            found.append(Group(attribute=attribute, value=value, members=hits, others=misses, auc=area, strict=strict))
    return tuple(found)


def _checked(claim: Membership, n: int) -> Floats:
    scores: Floats = claim.scores.detach().to("cpu", torch.float64).numpy()
    if scores.shape != (n,):
        raise ClaimError(f"membership claim: {scores.shape} scores for {n} candidates; give one score per candidate")
    if np.isnan(scores).any():
        raise ClaimError(f"membership claim: {int(np.isnan(scores).sum())} of {n} scores are NaN; give each candidate a number")
    return scores


def _standard(scores: Floats) -> Floats:
    spread = float(scores.std())
    standard: Floats = (scores - scores.mean()) / (spread or 1.0)
    return standard


def _above(some: Floats, others: Floats) -> Floats:
    """For each of ``some``, the share of ``others`` it lies above, ties by half."""
    ranked = np.sort(others)
    below, upto = np.searchsorted(ranked, some, "left"), np.searchsorted(ranked, some, "right")
    return np.asarray((below + upto) / (2 * len(ranked)), dtype=np.float64)


def _mean_variance(deviations: Floats, groups: NDArray[np.generic]) -> float:
    """Variance of the mean of ``deviations`` whose groups are independent of one another."""
    sums = np.bincount(np.unique(groups, return_inverse=True)[1], weights=deviations)
    return float(len(sums) / (len(sums) - 1) * np.square(sums).sum() / len(deviations) ** 2)
