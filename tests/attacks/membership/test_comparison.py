from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch

from flpriv.attacks.membership.comparison import compared


def reference(own: float, others: Sequence[float], *, trim: float = math.inf) -> float:
    """Φ((s − μ) / σ) in plain Python."""
    mean, spread = statistics.mean(others), statistics.stdev(others)
    kept = [score for score in others if abs(score - mean) <= trim * spread]
    mean, spread = statistics.mean(kept), statistics.stdev(kept)
    return 0.5 * (1 + math.erf((own - mean) / spread / math.sqrt(2)))


def draw(nodes: int, *, seed: int) -> dict[int, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return {node: torch.randn(7, generator=rng, dtype=torch.float64) for node in range(nodes)}


@pytest.mark.parametrize("nodes", [3, 6])
def test_scores_are_the_formula_in_plain_python(nodes: int) -> None:
    scores = {round: draw(nodes, seed=round) for round in (1, 2)}
    found = compared(scores, trim=None)
    assert list(found) == list(range(nodes))
    for node, columns in found.items():
        for round, column in zip((1, 2), columns, strict=True):
            for row in range(7):
                others = [float(score[row]) for other, score in scores[round].items() if other != node]
                assert float(column[row]) == pytest.approx(reference(float(scores[round][node or 0][row]), others), abs=1e-6)


def test_outliers_among_the_others_are_left_out_where_asked() -> None:
    scores = draw(14, seed=3)
    scores[9] = scores[9] + 50.0
    found = compared({1: scores}, trim=3.0)
    plain = compared({1: scores}, trim=None)
    for row in range(7):
        others = [float(score[row]) for other, score in scores.items() if other != 0]
        assert float(found[0][0][row]) == pytest.approx(reference(float(scores[0][row]), others, trim=3.0), abs=1e-6)
    assert not torch.allclose(found[0][0], plain[0][0], atol=0.01)
    few = {node: score for node, score in scores.items() if node in (0, 1, 9)}
    assert torch.equal(compared({1: few}, trim=3.0)[0][0], compared({1: few}, trim=None)[0][0])


def test_equal_scores_speak_for_nobody() -> None:
    alike = {node: torch.ones(2, dtype=torch.float64) for node in range(3)}
    assert all(column.tolist() == [0.5, 0.5] for columns in compared({1: alike}, trim=3.0).values() for column in columns)
