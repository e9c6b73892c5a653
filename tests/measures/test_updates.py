from __future__ import annotations

import pytest
import torch

from flpriv.claim import Reconstruction
from flpriv.finding import Metric
from flpriv.measures.shares import share_interval
from flpriv.measures.updates import INSENSITIVE, caveats, metrics, updates


def claim(
    node: int | None, *, round: int = 1, method: str = "", sensitivity: float | None = None, images: int = 1
) -> Reconstruction:
    return Reconstruction(images=torch.zeros(images, 1, 4, 4), round=round, node=node, method=method, sensitivity=sensitivity)


def one(claims: list[Reconstruction]) -> Metric:
    found = metrics(updates(claims), seed=0)
    assert len(found) == 1
    return found[0]


def test_claims_that_say_nothing_of_updates_make_no_metric_and_no_caveat() -> None:
    attacked = updates([claim(1), claim(2)])
    assert metrics(attacked, seed=0) == ()
    assert caveats(attacked) == []


def test_updates_are_counted_by_how_they_were_inverted() -> None:
    exact = "exact: dense + ReLU"
    claims = [claim(1, method=exact), claim(1, method=exact), claim(2, method=exact), claim(3, method=exact, images=0), claim(4)]
    found = one(claims)
    assert found.name == f"fraction of updates inverted by {exact}"
    assert (found.value, found.n) == (0.5, 4)
    assert found.note == f"2 of 4 updates were inverted by {exact}, as the attack says"
    assert (found.low, found.high) == share_interval([True, True, False, False], list("1234"))
    assert caveats(updates(claims)) == []


def test_each_method_is_counted_for_itself() -> None:
    found = metrics(updates([claim(1, method="exact"), claim(2, method="search"), claim(3, method="search")]), seed=0)
    assert [metric.note for metric in found] == [
        "1 of 3 updates was inverted by exact, as the attack says",
        "2 of 3 updates were inverted by search, as the attack says",
    ]


def test_sensitivity_is_the_mean_over_updates_not_over_what_is_claimed_of_each() -> None:
    claims = [
        claim(1, sensitivity=0.2),
        claim(1, sensitivity=0.2),
        claim(2, sensitivity=0.1),
        claim(3),
        claim(None, sensitivity=0.3),
    ]
    found = one(claims)
    assert found.value == pytest.approx(0.2)
    assert found.n == 3
    assert found.low is not None
    assert found.high is not None
    assert 0.1 <= found.low < 0.2 < found.high <= 0.3
    assert caveats(updates(claims)) == []
    alone = one([claim(1, sensitivity=0.2), claim(1, round=2, sensitivity=0.1)])
    assert (alone.n, alone.low, alone.high) == (2, None, None)


def test_updates_that_hardly_depend_on_the_images_are_a_caveat() -> None:
    found = caveats(updates([claim(1, sensitivity=0.002), claim(2, sensitivity=INSENSITIVE), claim(3, sensitivity=0.003)]))
    assert len(found) == 1
    assert found[0].startswith("2 of 3 updates hardly depend on the images (sensitivity below 0.01)")
    assert caveats(updates([claim(1, sensitivity=0.0)]))[0].startswith("1 of 1 update hardly depends on the images")
