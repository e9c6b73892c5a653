"""Numbers about people (their age): how much of the spread between held-out patients an estimate explains, beyond baselines."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from flpriv.bands import years
from flpriv.claim import Estimate
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Metric
from flpriv.measures.attribute import FEW
from flpriv.measures.intervals import bootstrap
from flpriv.truth import Truth

Floats = NDArray[np.float64]
Key = tuple[str, str]
"""Baseline (empty for the attack itself) and probe."""

R2 = "R² (share of variance explained)"


def r2(true: Floats, said: Floats) -> float:
    """``1 - Σ (true - said)² / Σ (true - mean)²``, averaged over the rows of ``said``; NaN where ``true`` is all alike."""
    spread = float(np.square(true - true.mean()).sum())
    return float(1 - np.square(true - said).sum(1).mean() / spread) if spread > 0 else float("nan")


def findings(claims: Sequence[Estimate], truth: Truth, new: Callable[..., Finding], *, seed: int) -> list[Finding]:
    """One finding over all sites, then one for each site that has enough records.

    Scored on candidates no site trained on whose value is known, where there are at least ``FEW``; else on all that are known,
    with a caveat. Each set of features is represented by its best probe, baselines like the attack itself; intervals are over
    patients.

    Raises:
        ClaimError: for claims about several attributes, of a wrong size, not finite, without the attack's own, or where the truth
            is known of too few candidates.
    """
    attribute, candidates = claims[0].attribute, truth.candidates
    if len({claim.attribute for claim in claims}) > 1:
        raise ClaimError("estimates: one attack claims several attributes; run it once for each")
    if candidates is None or attribute not in candidates.attributes:
        raise ClaimError(f"attribute {attribute!r} cannot be measured: it is not known of the candidates")
    known = np.array([np.nan if (age := years(value)) is None else age for value in candidates.attributes[attribute]])
    rows, caveats = ~np.isnan(known), []
    held_out = rows & ~truth.members.numpy().astype(bool) if truth.members is not None else rows & False
    if held_out.sum() >= FEW:
        rows = held_out
    else:
        caveats.append(f"Only {held_out.sum()} held-out records tell their {attribute}: scored on all {rows.sum()}.")
    if rows.sum() < 3 or np.ptp(known[rows]) == 0:
        raise ClaimError(f"attribute {attribute!r} cannot be measured: {rows.sum()} candidates tell it, all alike or too few")
    grouped: dict[Key, list[Floats]] = {}
    for claim in sorted(claims, key=lambda claim: claim.repeat):
        values = claim.values.detach().to("cpu").double().numpy()
        if values.shape != known.shape or not np.isfinite(values).all():
            raise ClaimError(
                f"estimate of {attribute}: {values.shape} values for {len(known)} candidates; give each a finite number"
            )
        grouped.setdefault((claim.baseline, claim.probe), []).append(values[rows])
    said = {key: np.stack(values) for key, values in grouped.items()}
    if not any(baseline == "" for baseline, _ in said):
        raise ClaimError("estimates: every claim is a baseline's; the attack's own are missing")
    true, n = known[rows], len(candidates)
    patients = np.asarray(candidates.patients or [str(i) for i in range(n)])[rows]
    found = [_finding(true, said, patients, new, tuple(caveats), site="", seed=seed)]
    site = np.asarray(candidates.attributes.get("site", ("",) * n))[rows]
    for name in sorted(set(site.tolist()) - {""}):
        here = site == name
        if here.sum() >= FEW and np.ptp(true[here]) > 0:
            own = {key: values[:, here] for key, values in said.items()}
            found.append(_finding(true[here], own, patients[here], new, (), site=name, seed=seed))
    return found


def _finding(
    true: Floats,
    said: dict[Key, Floats],
    patients: NDArray[np.str_],
    new: Callable[..., Finding],
    caveats: tuple[str, ...],
    *,
    site: str,
    seed: int,
) -> Finding:
    def best(baseline: str) -> Key:
        return max((key for key in said if key[0] == baseline), key=lambda key: r2(true, said[key]))

    own = best("")
    rivals = [best(name) for name in dict.fromkeys(baseline for baseline, _ in said if baseline)]
    rival = max(rivals, key=lambda key: r2(true, said[key]), default=None)
    null, null_name = (r2(true, said[rival]), rival[0]) if rival else (0.0, "the mean")

    def spread(name: str, of: Callable[[Floats, Floats], float], null: float, *, unit: str = "", note: str = "") -> Metric:
        interval = bootstrap(lambda rows: of(true[rows], said[own][:, rows]), patients.tolist(), seed=seed) or (None, None)
        value, (low, high) = of(true, said[own]), interval
        return Metric(
            name=name, value=value, low=low, high=high, n=true.size, null=null, null_name=null_name, unit=unit, note=note
        )

    headline = spread(R2, r2, null, note=own[1])
    worst = float(np.abs(true - (said[rival] if rival else true.mean())).mean())
    error = spread("mean absolute error", lambda t, s: float(np.abs(t - s).mean()), worst, unit="years", note="lower is better")
    correlation = spread("correlation", lambda t, s: float(np.corrcoef(t, s.mean(0))[0, 1]), 0.0)
    others = [
        Metric(
            name=f"R², {baseline or 'trained model'}, {probe}", value=r2(true, values), n=len(values), note=_times(len(values))
        )
        for (baseline, probe), values in sorted(said.items())
    ]
    doubts = list(caveats)
    if headline.low is not None and headline.low <= null:
        doubts.append(f"Not told apart from the baseline '{null_name}': the trained model may add nothing to it.")
    if (count := len(set(patients.tolist()))) < FEW:
        doubts.append(f"Only {count} patients are scored: the interval is wide.")
    return new(site=site, headline=headline, metrics=(headline, error, correlation, *others), caveats=tuple(doubts))


def _times(repeats: int) -> str:
    return "one run, no randomness" if repeats == 1 else f"mean over {repeats} repeats"
