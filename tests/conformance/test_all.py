"""Every registered attack and defence keeps its contract and does what it says."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from flpriv.registry import create, plugins
from flpriv.testing import check_attack, check_defense

SHORTER: Mapping[str, Mapping[str, Any]] = {
    "inverting-gradients": {"iterations": 100},
    "model-inconsistency": {"then": "dense-relu"},
    "property-inference": {"updates": 20, "spread": 1},
    "site-inference": {"repeats": 1},
}
"""Options that make an iterative attack fast enough for five runs; the others are checked as they come."""


@pytest.mark.parametrize("name", plugins("attacks"))
def test_attack(name: str) -> None:
    check_attack(create("attacks", name, SHORTER.get(name, {})))


@pytest.mark.parametrize("name", plugins("defenses"))
def test_defense(name: str) -> None:
    check_defense(create("defenses", name, {}))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gaussian", {"noise_multiplier": 0, "max_grad_norm": float("inf")}),
        ("gaussian", {"noise_multiplier": 4.0, "formal": True}),
        ("laplace", {"noise_multiplier": 0, "max_grad_norm": float("inf")}),
        ("qsgd", {"levels": 2}),
        ("top-k", {"keep": 1.0}),
        ("uniform-quantiser", {"bits": 2}),
        ("dp-sgd", {"noise_multiplier": 0, "poisson": False}),
    ],
)
def test_defense_at_other_strengths(name: str, options: Mapping[str, Any]) -> None:
    check_defense(create("defenses", name, options))


def test_shorter_options_belong_to_registered_attacks() -> None:
    assert set(SHORTER) <= set(plugins("attacks"))
