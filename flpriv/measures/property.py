"""Properties: how well claims about the records behind updates are told from one another, against the prior."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from flpriv.claim import Property
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Metric
from flpriv.measures.intervals import clopper_pearson
from flpriv.measures.membership import auc, auc_interval
from flpriv.property import has
from flpriv.truth import Truth

FEW = 20
"""With fewer observations than this, a caveat says so."""


def findings(claims: Sequence[Property], truth: Truth, new: Callable[..., Finding]) -> list[Finding]:
    """One finding over all observations, then one per site over its own, where telling sites apart is of no use.

    An update has the property if more than the claimed share of the records behind it, of those for which it is known, have it.
    The headline is the AUC of the probabilities over observations, n/a where all observations are alike. Over all sites its null
    is what somebody reaches who knows only how often each site's updates have the property, where that is more than chance.
    Beside it stands the accuracy at one half against the more frequent answer.

    Raises:
        ClaimError: for claims about several properties, or where nothing is known of the records behind any update.
    """
    if len({(claim.property, claim.share) for claim in claims}) != 1:
        raise ClaimError("property claims: one attack claims several properties; run it once for each")
    scored = []
    for claim in claims:
        behind = truth.used.get((claim.round, claim.node))
        if behind is not None:
            held, known = has(behind, claim.property)
            if bool(known.any()):
                share = float(held.sum()) / float(known.sum())
                scored.append((claim.probability, share > claim.share, truth.site_of.get(claim.node, "")))
    if not scored:
        raise ClaimError(f"property {claims[0].property!r} cannot be measured: it is not known of the records behind any update")
    sites = sorted({site for _, _, site in scored} - {""})
    return [_finding(scored, new, site=""), *(_finding([s for s in scored if s[2] == site], new, site=site) for site in sites)]


def _finding(scored: Sequence[tuple[float, bool, str]], new: Callable[..., Finding], *, site: str) -> Finding:
    guesses, held = np.array([one[0] for one in scored]), np.array([one[1] for one in scored], dtype=bool)
    count, those = len(held), int(held.sum())
    right = int(((guesses > 0.5) == held).sum())
    low, high = clopper_pearson(right, count)
    accuracy = Metric(
        name="accuracy",
        value=right / count,
        low=low,
        high=high,
        n=count,
        null=max(those, count - those) / count,
        null_name="prior",
        note="of the guess whether an update has the property, at one half",
    )
    note = f"{those} of {count} updates have the property"
    caveats = [] if site else ["Updates are taken as independent, and a site's are not: see the sites' own findings."]
    if count < FEW:
        caveats.append(f"Only {count} updates are scored: the interval is wide.")
    if those in (0, count):
        area = Metric(name="AUC", value=None, n=count, null=0.5, null_name="chance", note=f"{note}: nothing to tell apart")
    else:
        low, high = auc_interval(guesses, held)
        shares = auc(_by_site(scored), held)
        null, null_name = (shares, "share at each site") if shares > 0.5 else (0.5, "chance")
        value = auc(guesses, held)
        area = Metric(name="AUC", value=value, low=low, high=high, n=count, null=null, null_name=null_name, note=note)
    return new(site=site, headline=area, metrics=(area, accuracy), caveats=tuple(caveats))


def _by_site(scored: Sequence[tuple[float, bool, str]]) -> list[float]:
    """The share of its site's updates that have the property, for each observation."""
    share = {site: float(np.mean([held for _, held, of in scored if of == site])) for site in {of for _, _, of in scored}}
    return [share[site] for _, _, site in scored]
