from __future__ import annotations

import pytest

from flpriv.bands import band, bands, is_band, years
from flpriv.errors import ScenarioError


def test_bands_cover_every_age_once() -> None:
    names = bands((40, 60, 80))
    assert names == ("0-39", "40-59", "60-79", "80+")
    assert [band(age, names) for age in ("0", "39.9", "40", "59", "79", "80", "104")] == [
        "0-39", "0-39", "40-59", "40-59", "60-79", "80+", "80+",
    ]  # fmt: skip
    assert all(map(is_band, names))


@pytest.mark.parametrize("age", ["", "unknown", "nan", "inf", "-3"])
def test_unknown_ages_are_in_no_band(age: str) -> None:
    assert band(age, bands((40,))) == ""


def test_years_are_finite_numbers_or_unknown() -> None:
    assert [years(age) for age in ("61.5", "0", "", "unknown", "nan", "inf")] == [61.5, 0.0, None, None, None, None]


@pytest.mark.parametrize("name", ["F", "site-1", "a", "-", "3", "+", "1-", ""])
def test_other_names_are_no_bands(name: str) -> None:
    assert not is_band(name)


@pytest.mark.parametrize("edges", [(60, 40), (40, 40), (0, 40)])
def test_edges_must_rise(edges: tuple[int, ...]) -> None:
    with pytest.raises(ScenarioError, match="must be positive and rise"):
        bands(edges)
