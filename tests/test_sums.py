"""Sums over nodes: what an adversary sees where single replies are hidden."""

from __future__ import annotations

import pytest
import torch

from flpriv.capture import Observation
from flpriv.sums import sums


def reply(node: int, value: float, *, examples: int | None, round: int = 1, sent: float = 0.0, trap: str = "") -> Observation:
    return Observation(
        round=round,
        node=node,
        sent={"w": torch.full((2,), sent), "n": torch.tensor(3)},
        returned={"w": torch.full((2,), value), "n": torch.tensor(4)},
        examples=examples,
        metrics={"loss": 1.0},
        labels=torch.tensor([node]),
        trap=trap,
        nodes=(1, 2),
    )


def test_replies_count_by_their_examples_and_nothing_of_one_node_is_left() -> None:
    (seen,) = sums([reply(1, 1.0, examples=10), reply(2, 4.0, examples=30, trap="imprint")])
    assert seen.node is None and seen.examples == 40 and seen.trap == "imprint" and seen.nodes == (1, 2)
    assert seen.labels is None and not seen.metrics
    assert seen.returned["w"].tolist() == [3.25, 3.25] and seen.returned["w"].dtype == torch.float32
    assert seen.returned["n"] == 4


def test_where_models_differ_the_mean_of_what_was_sent_stands_for_them() -> None:
    one, two, three = (reply(n, 1.0 + n, examples=n, sent=float(n)) for n in (1, 2, 3))
    (seen,) = sums([one, two, three])
    assert seen.sent["w"].tolist() == pytest.approx([14 / 6] * 2)
    assert seen.update["w"].tolist() == pytest.approx([1.0, 1.0])


def test_without_examples_all_count_the_same() -> None:
    (seen,) = sums([reply(1, 1.0, examples=None), reply(2, 2.0, examples=None)])
    assert seen.examples is None and seen.returned["w"].tolist() == [1.5, 1.5]


def test_one_sum_a_round_and_sums_stay() -> None:
    first, second = sums([reply(1, 1.0, examples=1, round=2), reply(2, 2.0, examples=1), reply(1, 4.0, examples=1)])
    assert (first.round, second.round) == (1, 2)
    assert sums([first, second]) == (first, second)
    assert sums([]) == ()
