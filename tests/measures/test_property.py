from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, roc_auc_score

from flpriv import risk
from flpriv.claim import Goal, Membership, Property
from flpriv.errors import ClaimError
from flpriv.finding import Level
from flpriv.measures import measure
from flpriv.records import Records
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="b", goal=Goal.ATTRIBUTE, setting="none", defense="none")
SITES = {7: "east", 9: "west"}


def behind(women: int, *, of: int = 4, unknown: int = 0) -> Records:
    sexes = ("F",) * women + ("M",) * (of - women) + ("",) * unknown
    n = len(sexes)
    return Records(images=torch.zeros(n, 1, 2, 2), labels=torch.zeros(n, dtype=torch.long), attributes={"sex": sexes})


def claim(round: int, node: int, probability: float, *, share: float = 0.5) -> Property:
    return Property(property="sex=F", share=share, round=round, node=node, probability=probability)


def drawn() -> tuple[list[Property], Truth, list[bool], list[float]]:
    rng = np.random.default_rng(0)
    used, claims, held, guesses = {}, [], [], []
    for round in range(1, 21):
        for node in SITES:
            women = int(rng.integers(0, 5))
            used[round, node] = behind(women, unknown=1)
            held.append(women > 2)
            guesses.append(float(np.clip(0.5 + 0.3 * (2 * held[-1] - 1) + 0.3 * rng.normal(), 0, 1)))
            claims.append(claim(round, node, guesses[-1]))
    return claims, Truth(used=used, site_of=SITES), held, guesses


def test_numbers_are_sklearns() -> None:
    claims, truth, held, guesses = drawn()
    overall, east, west = judge(claims, truth)
    area, accuracy = overall.metrics
    assert overall.headline is area
    assert area.value == pytest.approx(roc_auc_score(held, guesses))
    assert area.low is not None
    assert area.high is not None
    assert area.value is not None
    assert area.low < area.value < area.high
    assert accuracy.value == pytest.approx(accuracy_score(held, np.array(guesses) > 0.5))
    assert accuracy.null == pytest.approx(max(np.mean(held), 1 - np.mean(held)))
    assert (east.site, west.site) == ("east", "west")
    assert east.headline is not None
    assert east.headline.value == pytest.approx(roc_auc_score(held[::2], guesses[::2]))
    assert risk.judge(overall).level is not Level.NONE


def test_telling_sites_apart_is_the_null_over_all_of_them() -> None:
    """One site has mostly women and the other mostly men: who tells the site has told no more than the shares do."""
    used = {(round, 7): behind(1 if round == 1 else 4) for round in range(1, 11)}
    used |= {(round, 9): behind(4 if round == 1 else 0) for round in range(1, 11)}
    claims = [claim(round, node, 0.9 if node == 7 else 0.1) for round, node in used]
    overall, east, _ = judge(claims, Truth(used=used, site_of=SITES))
    assert overall.headline is not None
    assert overall.headline.value == overall.headline.null == pytest.approx(0.9)
    assert overall.headline.null_name == "share at each site"
    assert risk.judge(overall).level is Level.NONE
    assert east.headline is not None
    assert (east.headline.value, east.headline.null, east.headline.null_name) == (0.5, 0.5, "chance")


def test_observations_that_are_all_alike_are_not_applicable() -> None:
    truth = Truth(used={(1, 7): behind(4), (2, 7): behind(3)}, site_of=SITES)
    overall, _ = judge([claim(1, 7, 0.9), claim(2, 7, 0.2)], truth)
    assert overall.headline is not None
    assert overall.headline.value is None
    assert "2 of 2 updates have the property: nothing to tell apart" in overall.headline.note
    assert overall.metrics[1].value == 0.5
    assert overall.metrics[1].null == 1
    assert any("Only 2 updates" in caveat for caveat in overall.caveats)


def test_a_share_of_zero_asks_for_any() -> None:
    truth = Truth(used={(1, 7): behind(1), (2, 7): behind(0)}, site_of=SITES)
    overall, _ = judge([claim(1, 7, 0.9, share=0), claim(2, 7, 0.2, share=0)], truth)
    assert overall.headline is not None
    assert overall.headline.value == 1


def test_claims_that_do_not_fit_are_refused() -> None:
    truth = Truth(used={(1, 7): behind(0, of=0, unknown=3)}, site_of=SITES)
    with pytest.raises(ClaimError, match="not known of the records"):
        judge([claim(1, 7, 0.5)], truth)
    with pytest.raises(ClaimError, match="several properties"):
        judge([claim(1, 7, 0.5), claim(1, 7, 0.5, share=0)], truth)
    with pytest.raises(ClaimError, match="not of type Property"):
        judge([claim(1, 7, 0.5), Membership(scores=torch.zeros(1))], truth)
