"""Properties of records, as ``"sex=F"``, ``"age>=60"``, ``"age<18"`` or ``"label=1"``: attack and measure read them alike."""

from __future__ import annotations

import math
import re

import torch
from torch import Tensor

from flpriv.errors import ScenarioError
from flpriv.records import Records

PATTERN = r"^\w+(>=|<|=).+$"


def has(records: Records, property: str) -> tuple[Tensor, Tensor]:
    """Which records have the property, and of which it is known: two ``(N,)`` bool tensors, the first false where unknown.

    Args:
        records: with attributes; ``label`` is the class index.
        property: an attribute, ``=``, ``>=`` or ``<``, and a value; the latter two compare numbers.

    Raises:
        ScenarioError: if it is not of that form.
    """
    match = re.match(r"^(\w+)(>=|<|=)(.+)$", property)
    if match is None:
        raise ScenarioError(f"property {property!r}: write attribute=value, attribute>=number or attribute<number")
    name, how, value = match.groups()
    if how != "=" and math.isnan(bound := _number(value)):
        raise ScenarioError(f"property {property!r}: {value!r} is not a number")
    column = [str(label) for label in records.labels.tolist()] if name == "label" else list(records.attributes.get(name, ()))
    if not column:
        return torch.zeros(len(records), dtype=torch.bool), torch.zeros(len(records), dtype=torch.bool)
    if how == "=":
        known = [entry != "" for entry in column]
        held = [entry == value for entry in column]
    else:
        numbers = [_number(entry) for entry in column]
        known = [not math.isnan(number) for number in numbers]
        held = [number >= bound if how == ">=" else number < bound for number in numbers]
    return torch.tensor(held) & torch.tensor(known), torch.tensor(known)


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan
