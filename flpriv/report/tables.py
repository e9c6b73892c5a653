"""A verdict as tables: for the page, as tidy rows for pandas, and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flpriv.claim import Goal
from flpriv.finding import Confusion, Finding, Metric, SettingResult, Verdict
from flpriv.threat import DESCRIPTIONS
from flpriv.verdicts import plain

if TYPE_CHECKING:
    import pandas as pd

UNDEFENDED = "none"
NOT_AVAILABLE = "n/a"
NO_BREAK = "\u00a0"
JSON_FORMAT = "flpriv-report"
JSON_VERSION = 1
COLUMNS = (
    "run", "kind", "threat", "attack", "name", "goal", "setting", "defense", "site", "status", "level", "metric", "headline",
    "value", "low", "high", "n", "unit", "null", "null_name", "second_null", "second_null_name",
    "threshold", "note", "message", "seconds",
)  # fmt: skip
"""Columns of the CSV; ``kind``: ``"attack"``, ``"utility"``, ``"train utility"``, ``"armed utility"``, ``"claimed epsilon"``."""

_SHARES = ("fraction", "accuracy", "balanced accuracy", "tpr", "recall", "lift", "re-identification", "lenient rule")

ADVERSARIES: Mapping[str, str] = {
    "model-user": "Somebody who receives the finished model and nothing else from the training.",
    "sums-only": "Whoever runs the server while secure aggregation hides every single site: only sums over sites are seen.",
    "honest-but-curious": "Whoever runs the server, follows the protocol to the letter, and reads all that passes through.",
    "malicious-server": "Whoever runs the server, reads everything, and may also alter the model that sites are asked to train.",
    "malicious-sums-only": "Whoever runs the server and may alter the model sent, but sees only sums over sites.",
}
"""The named threat models in plain words."""

GOALS: Mapping[Goal, tuple[str, str]] = {
    Goal.RECONSTRUCTION: ("Reconstruction", "Can images of patients be rebuilt from what the adversary sees?"),
    Goal.MEMBERSHIP: ("Membership", "Can the adversary tell whether a given patient's image was used in training?"),
    Goal.ATTRIBUTE: ("Attributes", "Can the adversary tell something about a patient: which site, which sex, what age?"),
    Goal.PRIVACY_BOUND: ("Privacy bound", "How much privacy loss (epsilon) does a test with planted records prove?"),
}
"""Each goal: its heading, and the question it answers."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One attack in a matrix: a finding for each column, ``None`` where there is none."""

    attack: str
    name: str
    goal: Goal
    metric: str
    cells: tuple[Finding | None, ...]


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """Attacks down, sites or defences across."""

    columns: tuple[str, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True, kw_only=True)
class Lift:
    """An attack's accuracy beside a baseline's; ``lift`` is the difference, both in [0, 1]."""

    name: str
    accuracy: float
    lift: float


def defenses(verdict: Verdict) -> tuple[str, ...]:
    """Labels of the stacks of defences in order of appearance, ``"none"`` first."""
    seen = dict.fromkeys([*(s.defense for s in verdict.settings), *(f.defense for f in verdict.findings)])
    return tuple(sorted(seen, key=lambda label: label != UNDEFENDED))


def by_defense(verdict: Verdict) -> Matrix:
    """Attack × defence, over all sites together."""
    columns = defenses(verdict)
    return matrix(columns, {(f.attack, f.defense): f for f in overall(verdict.findings)})


def by_site(verdict: Verdict, defense: str = UNDEFENDED) -> Matrix:
    """Attack × site under one defence, all sites together in the first column (``""``); no rows where nothing is told by site."""
    found = [f for f in verdict.findings if f.defense == defense]
    named = dict.fromkeys([*(site.name for site in verdict.sites), *(f.site for f in found if f.site)])
    split = {f.attack for f in found if f.site}
    return matrix(("", *named), {(f.attack, f.site): f for f in found if f.attack in split})


def overall(findings: Iterable[Finding]) -> list[Finding]:
    """The findings over all sites; where an attack on a setting has none, the worst of its sites' stands for it."""
    best: dict[tuple[str, str], Finding] = {}
    for finding in findings:
        key = (finding.attack, finding.setting)
        known = best.get(key)
        if known is None or (known.site and (not finding.site or finding.level > known.level)):
            best[key] = finding
    return list(best.values())


def lifts(confusion: Confusion) -> list[Lift]:
    """Each baseline with the lift over it, the best baseline first."""
    ranked = sorted(confusion.baselines.items(), key=lambda item: -item[1])
    return [Lift(name=name, accuracy=value, lift=confusion.accuracy - value) for name, value in ranked]


def utility_of(verdict: Verdict, finding: Finding) -> Metric | None:
    """The utility that goes with a finding: of the shared federation under the same defence, else of the attacked one.

    An attack may bring a federation of its own (a single round, a trap); what a defence costs is told by the shared one.
    """
    known = {setting.id: setting for setting in verdict.settings}
    for id in (finding.defense, finding.setting):
        if id in known and (metric := headline_utility(known[id])) is not None:
            return metric
    return None


def headline_utility(setting: SettingResult) -> Metric | None:
    """Balanced accuracy where it was measured, else the first metric with a value."""
    known = [metric for metric in setting.utility if metric.value is not None]
    return next((metric for metric in known if metric.name == "balanced accuracy"), known[0] if known else None)


def out_of_reach(verdict: Verdict) -> list[str]:
    """What the adversary did not see, know or do, in plain words (``"does not see every client's own update"``)."""
    missing = [text for text in DESCRIPTIONS.values() if text not in verdict.adversary]
    return [f"does not {verb.removesuffix('s')} {rest}" for verb, _, rest in (text.partition(" ") for text in missing)]


def number(value: float | None, metric: Metric, *, unit: bool = True, digits: int | None = None) -> str:
    """``value`` as the metric reads: ``"87 %"``, ``"31.2 dB"``, ``"0.653"``, ``"n/a"``.

    A share that is not whole never reads 100 %. ``digits`` after the point go by the size of the value where they are not given.
    """
    if value is None or math.isnan(value):
        return NOT_AVAILABLE
    share = is_share(metric)
    size = abs(100 * value if share else value)
    if math.isinf(value):
        text = "∞" if value > 0 else "-∞"
    elif share:
        digits = (1 if 0 < size < 9.95 or 99.5 <= size < 100 else 0) if digits is None else digits
        text = f"{math.copysign(min(size, 99.9) if size < 100 else size, value):.{digits}f}"
    else:
        digits = 1 if metric.unit == "dB" else 3 if size < 1 else 2 if size < 10 else 1 if size < 100 else 0
        text = f"{value:.{digits}f}"
    name = "%" if share else metric.unit
    return text.replace("-", "−", 1) + (f"{NO_BREAK}{name}" if unit and name else "")


def interval(metric: Metric) -> str:
    """``"71 to 96 %"``, empty where there is no interval."""
    low, high = metric.low, metric.high
    if metric.value is None or low is None or high is None:
        return ""
    digits = (1 if high < 0.0995 or 0 < low < 0.01 or 0.995 < high < 1 else 0) if is_share(metric) else None
    return f"{number(low, metric, unit=False, digits=digits)} to {number(high, metric, digits=digits)}"


def is_share(metric: Metric) -> bool:
    """Whether the metric is a fraction read as a percentage."""
    return metric.unit == "%" or metric.name.lower().startswith(_SHARES)


def tidy(verdicts: Sequence[Verdict]) -> pd.DataFrame:
    """One row a metric, in :data:`COLUMNS`; a finding without metrics keeps one row, so that failures stay visible.

    Text that a spreadsheet would run as a formula (it begins with ``=``, ``+``, ``-`` or ``@``) gets an apostrophe in front.
    """
    import pandas as pd

    rows = [row for verdict in verdicts for row in _rows(verdict)]
    safe = [{key: _inert(value) for key, value in row.items()} for row in rows]
    return pd.DataFrame(safe, columns=list(COLUMNS))


def report_json(verdicts: Sequence[Verdict], *, redact_images: bool = False) -> str:
    """The verdicts as JSON, curves and counts as lists; images never, their scores always.

    Numbers that are not finite stand as the texts ``"inf"``, ``"-inf"`` and ``"nan"``.
    """
    content = {
        "format": JSON_FORMAT,
        "version": JSON_VERSION,
        "images": "left out" if redact_images else "on the page only",
        "verdicts": [
            _without_images(plain(verdict, place=lambda _, array: array.tolist() if array.ndim < 3 else None))
            for verdict in verdicts
        ],
    }
    return json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"


def matrix(columns: tuple[str, ...], found: Mapping[tuple[str, str], Finding]) -> Matrix:
    """The findings known by (attack, column), a row for each attack in order of appearance."""
    rows = []
    for attack in dict.fromkeys(attack for attack, _ in found):
        cells = tuple(found.get((attack, column)) for column in columns)
        some = next(cell for cell in cells if cell is not None)
        names = dict.fromkeys(cell.headline.name for cell in cells if cell is not None and cell.headline is not None)
        rows.append(Row(attack=attack, name=some.name, goal=some.goal, metric=" / ".join(names), cells=cells))
    return Matrix(columns=columns, rows=tuple(rows))


def _rows(verdict: Verdict) -> Iterable[dict[str, Any]]:
    run = {"run": verdict.title, "threat": verdict.threat}
    for finding in verdict.findings:
        about: dict[str, Any] = run | {
            "kind": "attack",
            "attack": finding.attack,
            "name": finding.name,
            "goal": finding.goal.value,
            "setting": finding.setting,
            "defense": finding.defense,
            "site": finding.site,
            "status": finding.status,
            "level": finding.level.name.lower(),
            "threshold": finding.threshold,
            "message": finding.message,
            "seconds": finding.seconds,
        }
        metrics = finding.metrics or ((finding.headline,) if finding.headline else ())
        for metric in metrics:
            yield about | _numbers(metric) | {"headline": metric == finding.headline}
        if not metrics:
            yield about
    for setting in verdict.settings:
        about = {**run, "setting": setting.id, "defense": setting.defense, "seconds": setting.seconds}
        for metric in setting.utility:
            yield about | {"kind": "utility"} | _numbers(metric)
        for metric in setting.train_utility:
            yield about | {"kind": "train utility"} | _numbers(metric)
        for metric in setting.armed_utility:
            yield about | {"kind": "armed utility"} | _numbers(metric)
        for site, epsilon in setting.epsilon.items():
            yield about | {"kind": "claimed epsilon", "site": site, "metric": "epsilon", "value": epsilon}


def _numbers(metric: Metric) -> dict[str, Any]:
    return {
        "metric": metric.name,
        "value": metric.value,
        "low": metric.low,
        "high": metric.high,
        "n": metric.n,
        "unit": metric.unit,
        "null": metric.null,
        "null_name": metric.null_name,
        "second_null": metric.second_null,
        "second_null_name": metric.second_null_name,
        "note": metric.note,
    }


def _without_images(table: dict[str, Any]) -> dict[str, Any]:
    for finding in table["findings"]:
        for pair in finding["pairs"]:
            for image in ("original", "reconstruction", "null"):
                pair.pop(image)
    return table


def _inert(value: Any) -> Any:
    return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value
