from __future__ import annotations

from functools import partial

from flpriv.claim import Goal, PrivacyBound
from flpriv.measures import measure
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="b", goal=Goal.PRIVACY_BOUND, setting="none", defense="none")


def bound(epsilon: float, *, ceiling: float = 4.2, claimed: float | None = None) -> PrivacyBound:
    return PrivacyBound(epsilon=epsilon, delta=1e-5, confidence=0.95, ceiling=ceiling, canaries=200, claimed=claimed)


def test_the_bound_stands_beside_its_ceiling_and_the_claim() -> None:
    (finding,) = judge([bound(1.2, claimed=3)], Truth())
    head, ceiling = finding.metrics
    assert finding.headline == head
    assert (head.value, head.low, head.n, head.null, head.null_name) == (1.2, 1.2, 200, 3, "claimed epsilon")
    assert (ceiling.name, ceiling.value) == ("ceiling of the test", 4.2)
    assert finding.caveats == ()


def test_a_broken_claim_a_low_ceiling_and_a_choice_of_bounds_are_caveats() -> None:
    (broken,) = judge([bound(3.5, claimed=1)], Truth())
    assert "exceeds the claimed 1.00" in broken.caveats[0]
    (blind,) = judge([bound(0, claimed=8)], Truth())
    assert "cannot show more than 4.20" in blind.caveats[0]
    (chosen,) = judge([bound(0.5), bound(1.5)], Truth())
    assert chosen.headline is not None
    assert (chosen.headline.value, chosen.headline.null) == (1.5, None)
    assert "largest of 2 bounds" in chosen.caveats[0]
