from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
import pytest
import torch

from flpriv.canary import Canaries, Planted, coins
from flpriv.claim import Goal, PrivacyBound
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Level, Metric
from flpriv.measures import measure
from flpriv.measures.bounds import Cap, ceiling, clopper_pearson_bound, gdp_bound, one_run, rates
from flpriv.measures.membership import auc
from flpriv.risk import judge as level_of
from flpriv.truth import Claimed, Truth

judge = partial(measure, attack="a", name="b", goal=Goal.PRIVACY_BOUND, setting="none", defense="none")
COINS = coins(200, seed=0)
PERFECT = COINS.double()
BOTH: tuple[Literal["epsilon", "mu"], ...] = ("epsilon", "mu")


def truth(included: torch.Tensor = COINS, claimed: float | None = None, delta: float = 1e-5) -> Truth:
    planted = Planted(canaries=Canaries(seeds=torch.arange(len(included))), included=included, place=0, site="A")
    return Truth(planted=planted, claimed={} if claimed is None else {"A": Claimed(epsilon=claimed, delta=delta)})


def noisy(shift: float) -> torch.Tensor:
    return shift * PERFECT + torch.randn(200, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def numbers(finding: Finding) -> dict[str, Metric]:
    return {metric.name: metric for metric in finding.metrics}


def test_the_bound_stands_beside_its_ceiling_and_the_claim() -> None:
    (finding,) = judge([PrivacyBound(scores=noisy(1))], truth(claimed=4))
    head = finding.headline
    assert head is not None
    bound = one_run(noisy(1).numpy(), COINS.numpy(), delta=1e-5)
    assert 0.3 < bound < 3
    assert (head.value, head.low, head.n, head.null, head.null_name) == (bound, bound, 200, 4, "claimed epsilon")
    found = numbers(finding)
    assert found["ceiling of the test"].value == ceiling(200, delta=1e-5)
    assert found["AUC of canaries"].value == pytest.approx(auc(noisy(1).numpy(), COINS.numpy()))
    assert found["largest AUC allowed"].value == Cap.of(4, delta=1e-5).auc
    half = [rates(noisy(1).numpy(), COINS.numpy(), by=by) for by in BOTH]
    assert found["epsilon, Clopper-Pearson"].value == clopper_pearson_bound(half[0], delta=1e-5)
    assert found["epsilon, Gaussian"].value == gdp_bound(half[1], delta=1e-5)
    assert finding.roc is not None
    assert finding.caveats == ()


def test_canaries_told_better_than_the_claim_allows_are_doubted() -> None:
    (finding,) = judge([PrivacyBound(scores=noisy(2))], truth(claimed=4))
    assert finding.headline is not None
    assert (finding.headline.value or 0) < 4
    assert "doubt the claim" in finding.caveats[0]
    assert level_of(finding).level is Level.HIGH


def test_a_broken_claim_is_critical_and_a_low_ceiling_a_caveat() -> None:
    (broken,) = judge([PrivacyBound(scores=PERFECT)], truth(claimed=1))
    assert "exceeds the claimed 1.00" in broken.caveats[0]
    assert level_of(broken).level is Level.CRITICAL
    (blind,) = judge([PrivacyBound(scores=noisy(0))], truth(claimed=8))
    assert "cannot show more than 4.16, less than the claimed 8.00" in blind.caveats[0]
    assert level_of(blind).level is Level.NONE


def test_the_bound_is_said_at_the_delta_of_the_claim() -> None:
    (finding,) = judge([PrivacyBound(scores=PERFECT, delta=1e-3)], truth(claimed=1, delta=1e-6))
    assert finding.headline is not None
    assert "delta 1e-06" in finding.headline.note
    (alone,) = judge([PrivacyBound(scores=PERFECT, delta=1e-3)], truth())
    assert alone.headline is not None
    assert (alone.headline.null, alone.headline.value) == (None, 0.0)
    assert "show nothing whatever happens" in alone.caveats[0]


def test_several_claims_share_the_error() -> None:
    (one,) = judge([PrivacyBound(scores=noisy(2))], truth())
    (two,) = judge([PrivacyBound(scores=noisy(0)), PrivacyBound(scores=noisy(2))], truth())
    assert one.headline is not None
    assert two.headline is not None
    assert 0 < (two.headline.value or 0) < (one.headline.value or 0)
    assert "largest of 2 bounds" in two.caveats[0]


def test_shuffled_coins_show_nothing() -> None:
    rng, alarms = np.random.default_rng(0), 0
    for _ in range(20):
        (finding,) = judge([PrivacyBound(scores=PERFECT)], truth(torch.from_numpy(rng.permutation(COINS.numpy()))))
        assert finding.headline is not None
        alarms += finding.headline.value != 0
    assert alarms <= 3


def test_scores_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ClaimError, match="scores for 200 canaries"):
        judge([PrivacyBound(scores=PERFECT[:199])], truth())
    with pytest.raises(ClaimError, match="1 of 200 scores are NaN"):
        judge([PrivacyBound(scores=PERFECT.index_fill(0, torch.tensor([3]), float("nan")))], truth())
    with pytest.raises(ClaimError, match="not known which canaries"):
        judge([PrivacyBound(scores=PERFECT)], Truth())


def test_coins_that_all_fell_alike_leave_no_rates() -> None:
    (finding,) = judge([PrivacyBound(scores=torch.zeros(20))], truth(torch.ones(20, dtype=torch.bool)))
    assert len(finding.metrics) == 2
    assert finding.roc is None
