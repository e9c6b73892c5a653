"""Age bands: named by whole years, so that attack and measure read the same names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from flpriv.errors import ScenarioError


def bands(edges: Sequence[int]) -> tuple[str, ...]:
    """Names of the bands between rising ``edges``: ``(40, 60)`` gives ``("0-39", "40-59", "60+")``.

    Raises:
        ScenarioError: for edges that do not rise.
    """
    starts = (0, *edges)
    if any(high <= low for low, high in pairwise(starts)):
        raise ScenarioError(f"age bands: edges {tuple(edges)} must be positive and rise")
    return (*(f"{low}-{high - 1}" for low, high in pairwise(starts)), f"{starts[-1]}+")


def band(age: str, names: Sequence[str]) -> str:
    """The band among ``names`` that holds ``age`` (years, a number as text); ``""`` where it is unknown or in none of them."""
    try:
        years = math.floor(float(age))
    except (ValueError, OverflowError):
        return ""
    for name in names:
        low, dash, high = name.removesuffix("+").partition("-")
        if int(low) <= years and (not dash or years <= int(high)):
            return name
    return ""


def is_band(name: str) -> bool:
    """Whether ``name`` is one that :func:`bands` gives."""
    low, _, high = name.removesuffix("+").partition("-")
    return low.isdigit() and (name == f"{low}+" or (name == f"{low}-{high}" and high.isdigit()))
