"""From what a table says to what a model learns: class, age and sex."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

DROP = "drop"
"""Stands for a class in a rule: rows it meets are left out."""

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")
_PARTS = re.compile(r"[|;,/]")
_UNKNOWN = {"", "unknown", "n/a", "na", "nan", "none", "null", "?"}


@dataclass(frozen=True, kw_only=True)
class Rule:
    """What class a label text means. The first of these that applies decides: empty, map, contains, threshold, other.

    Args:
        classes: class names in label order; a label that is one of them is that class.
        map: label text to class.
        contains: a finding to class, for texts of several findings, separated by ``|``, ``;``, ``,`` or ``/``, in any case.
        threshold: the text's last number makes the second class from here on, the first below.
        other: class of every other text.
        empty: class of an empty text.
    """

    classes: Sequence[str]
    map: Mapping[str, str] = field(default_factory=dict)
    contains: Mapping[str, str] = field(default_factory=dict)
    threshold: float | None = None
    other: str = ""
    empty: str = ""

    def __call__(self, text: str) -> str:
        """The class of ``text``, or ``"drop"``.

        Raises:
            ValueError: if no part of the rule applies.
        """
        text = text.strip()
        if not text:
            if not self.empty:
                raise ValueError("the label is empty; set label_empty to a class, or to 'drop'")
            return self.empty
        if text in self.map:
            return self.map[text]
        parts = {part.strip().lower() for part in _PARTS.split(text)}
        for finding, name in self.contains.items():
            if finding.lower() in parts:
                return name
        if self.threshold is not None and (numbers := _NUMBER.findall(text)):
            return self.classes[float(numbers[-1]) >= self.threshold]
        if text in self.classes:
            return text
        if self.other:
            return self.other
        raise ValueError(
            f"unknown label {text!r}; classes: {', '.join(self.classes)}; set label_map, label_contains or label_other"
        )


def years(text: str) -> str:
    """An age in whole years, ``""`` where unknown; ``"58"``, ``"58.0"``, ``"058Y"`` and ``"006M"`` are read.

    Raises:
        ValueError: if it is no age.
    """
    text = text.strip()
    if text.lower() in _UNKNOWN:
        return ""
    match = re.fullmatch(r"(\d{1,3})(?:\.\d+)?\s*([YMWDymwd]?)", text)
    if not match or (int(match[1]) > 130 and match[2].upper() in ("", "Y")):
        raise ValueError(f"age {text!r} is no number of years")
    per_year = {"": 1, "Y": 1, "M": 12, "W": 52, "D": 365}[match[2].upper()]
    return str(int(match[1]) // per_year)


def sex(text: str) -> str:
    """``"F"``, ``"M"``, or ``""`` where it is neither or unknown."""
    return {"f": "F", "female": "F", "m": "M", "male": "M"}.get(text.strip().lower(), "")
