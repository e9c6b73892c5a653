"""Empirical lower bounds on epsilon, each beside the most its test could have shown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from flpriv.claim import PrivacyBound
from flpriv.finding import Finding, Metric


def findings(claims: Sequence[PrivacyBound], new: Callable[..., Finding]) -> list[Finding]:
    """One finding: the largest of the claimed bounds, its ceiling and the epsilon the defence claims.

    The largest of several bounds holds with less than their stated confidence; a caveat says so.
    """
    best = max(claims, key=lambda claim: claim.epsilon)
    test = f"{best.confidence:.0%} confidence, delta {best.delta:g}"
    headline = Metric(
        name="epsilon, lower bound",
        value=best.epsilon,
        low=best.epsilon,
        n=best.canaries,
        null=best.claimed,
        null_name="claimed epsilon" if best.claimed is not None else "",
        note=test,
    )
    ceiling = Metric(
        name="ceiling of the test", value=best.ceiling, n=best.canaries, note="no leakage however large could have shown more"
    )
    caveats = []
    if len(claims) > 1:
        caveats.append(
            f"The largest of {len(claims)} bounds is shown; together they hold with less than {best.confidence:.0%} confidence."
        )
    if best.claimed is not None and best.epsilon > best.claimed:
        caveats.append(f"The measured bound {best.epsilon:.2f} exceeds the claimed {best.claimed:.2f}: the claim is wrong.")
    if best.claimed is not None and best.ceiling < best.claimed:
        caveats.append(
            f"{best.canaries} canaries cannot show more than {best.ceiling:.2f}, less than the claimed {best.claimed:.2f}."
        )
    return [new(headline=headline, metrics=(headline, ceiling), caveats=tuple(caveats))]
