"""Properties of records are read from attributes and labels; what is not known is told."""

from __future__ import annotations

import pytest
import torch

from flpriv.errors import ScenarioError
from flpriv.property import has
from flpriv.records import Records

RECORDS = Records(
    images=torch.zeros(4, 1, 2, 2),
    labels=torch.tensor([0, 1, 1, 0]),
    attributes={"sex": ("F", "M", "", "F"), "age": ("60", "59.5", "old", "")},
)


@pytest.mark.parametrize(
    ("property", "held", "known"),
    [
        ("sex=F", [1, 0, 0, 1], [1, 1, 0, 1]),
        ("age>=60", [1, 0, 0, 0], [1, 1, 0, 0]),
        ("age<60", [0, 1, 0, 0], [1, 1, 0, 0]),
        ("label=1", [0, 1, 1, 0], [1, 1, 1, 1]),
        ("view=AP", [0, 0, 0, 0], [0, 0, 0, 0]),
    ],
)
def test_who_has_it_and_of_whom_it_is_known(property: str, held: list[int], known: list[int]) -> None:
    found = has(RECORDS, property)
    assert [part.int().tolist() for part in found] == [held, known]


@pytest.mark.parametrize("property", ["sex", "=F", "age>60", "sex="])
def test_other_forms_are_refused(property: str) -> None:
    with pytest.raises(ScenarioError, match="write attribute=value"):
        has(RECORDS, property)


def test_bounds_are_numbers() -> None:
    with pytest.raises(ScenarioError, match="'old' is not a number"):
        has(RECORDS, "age>=old")
