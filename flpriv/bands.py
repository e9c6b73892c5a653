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
    known = years(age)
    for name in names if known is not None else ():
        low, dash, high = name.removesuffix("+").partition("-")
        if int(low) <= math.floor(known or 0) and (not dash or math.floor(known or 0) <= int(high)):
            return name
    return ""


def years(age: str) -> float | None:
    """``age`` as a finite number; ``None`` where it is unknown."""
    try:
        number = float(age)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


def is_band(name: str) -> bool:
    """Whether ``name`` is one that :func:`bands` gives."""
    low, _, high = name.removesuffix("+").partition("-")
    return low.isdigit() and (name == f"{low}+" or (name == f"{low}-{high}" and high.isdigit()))
