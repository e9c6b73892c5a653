"""The page: what a verdict says, arranged for a reader who never saw the code."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from flpriv.arrangement import FEDERATED, arrangement_of
from flpriv.claim import Goal
from flpriv.finding import Finding, Level, Metric, Pair, SettingResult, Verdict
from flpriv.report import figures, tables
from flpriv.report.exposure import Exposure, exposure, in_words

if TYPE_CHECKING:
    from jinja2 import Environment

IMAGE_BYTES = 6_500_000
"""Room for all images of a page together, as data URIs; larger ones are averaged down."""
SHOWN_PAIRS = 128
"""At most about this many reconstructions on a page, the best of each attack; at least four of each."""
_FOLDER = Path(__file__).parent


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One pair with its images, ``views`` is ``None`` where they are left out."""

    pair: Pair
    views: figures.Views | None


@dataclass(frozen=True, kw_only=True)
class Gallery:
    """The reconstructions of one finding; ``left_out`` more were not shown for want of room."""

    finding: Finding
    shown: tuple[Shown, ...]
    left_out: int


@dataclass(frozen=True, kw_only=True)
class AttackView:
    """One attack in the chapter of its goal: its findings, one a defence, and their common figures."""

    id: str
    attack: str
    name: str
    findings: tuple[Finding, ...]
    metrics: tuple[str, ...]
    roc: str
    galleries: tuple[Gallery, ...]

    def metric(self, finding: Finding, name: str) -> Metric | None:
        """The finding's metric of that name."""
        known = [*finding.metrics, *([finding.headline] if finding.headline else [])]
        return next((metric for metric in known if metric.name == name), None)

    def note(self, name: str) -> str:
        """What to keep in mind of the metric of that name, where all findings that have a value say the same."""
        found = [metric for finding in self.findings if (metric := self.metric(finding, name)) and metric.value is not None]
        notes = {metric.note for metric in found}
        return notes.pop() if len(notes) == 1 else ""


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """One leakage-against-utility plot."""

    goal: Goal
    metric: str
    svg: str


@dataclass(frozen=True, kw_only=True)
class Run:
    """One verdict, arranged for the template; ``id`` begins every anchor."""

    id: str
    verdict: Verdict
    adversary: str
    out_of_reach: tuple[str, ...]
    defenses: tuple[str, ...]
    by_defense: tables.Matrix
    by_site: tuple[tuple[str, tables.Matrix], ...]
    findings: tuple[Finding, ...]
    chapters: tuple[tuple[Goal, tuple[AttackView, ...]], ...]
    exposure: Exposure | None
    scatters: tuple[Scatter, ...]
    utilities: tuple[str, ...]
    armed: bool
    doubts: tuple[tuple[str, tuple[str, ...]], ...]
    utility: Metric | None

    @property
    def has_images(self) -> bool:
        """Whether some finding reconstructs images."""
        return any(finding.pairs for finding in self.verdict.findings)

    @property
    def has_volumes(self) -> bool:
        """Whether some of them are volumes."""
        return any(pair.original.ndim == 4 for finding in self.verdict.findings for pair in finding.pairs)

    @property
    def patients(self) -> int:
        """Patients of all sites together."""
        return sum(site.patients for site in self.verdict.sites)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes that some site counts."""
        return tuple(dict.fromkeys(name for site in self.verdict.sites for name in site.classes))

    @property
    def events(self) -> list[SettingResult]:
        """The settings in which something happened."""
        return [setting for setting in self.verdict.settings if setting.events]


def render(verdicts: Sequence[Verdict], *, redact_images: bool = False) -> str:
    """The whole page as text: one chapter for each verdict, a comparison in front where there are several."""
    galleries = [f for verdict in verdicts for f in tables.overall(verdict.findings) if f.pairs]
    most = max(4, SHOWN_PAIRS // max(1, len(galleries)))
    shown = sum(min(most, len(finding.pairs)) for finding in galleries)
    room = 0 if redact_images else IMAGE_BYTES // max(1, shown)
    runs = [_run(verdict, f"run-{place}", most=most, room=room) for place, verdict in enumerate(verdicts, 1)]
    script = (_FOLDER / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    page: str = (
        _environment()
        .get_template("page.html.j2")
        .render(runs=runs, compared=_compared(verdicts), redacted=redact_images, script=script, script_hash=digest)
    )
    return page.lstrip()


def _environment() -> Environment:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader = FileSystemLoader(_FOLDER)
    environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {
        "number": tables.number,
        "interval": tables.interval,
        "share": tables.is_share,
        "word": level_word,
        "named": defense_name,
        "under": under,
        "points": points,
        "of": lambda counts, name: counts.get(name, 0),
    }
    environment.globals |= {
        "lifts": tables.lifts,
        "goals": tables.GOALS,
        "levels": [level for level in Level if level is not Level.UNKNOWN],
        "units": {
            "psnr": Metric(name="PSNR", value=None, unit="dB"),
            "ssim": Metric(name="SSIM", value=None),
            "accuracy": Metric(name="accuracy", value=None),
            "epsilon": Metric(name="epsilon", value=None),
        },
    }
    return environment


def level_word(level: Level) -> str:
    """``"Critical"``, …; ``"Unknown"``."""
    return level.name.capitalize()


def defense_name(label: str) -> str:
    """The label, or words for its absence."""
    return "no defence" if label == tables.UNDEFENDED else label


def under(label: str) -> str:
    """``"Without a defence"``, ``"With dp-sgd"``, ``"Centralised"``."""
    if label == tables.UNDEFENDED:
        return "Without a defence"
    return f"With {label}" if arrangement_of(label) == FEDERATED else in_words(label)


def points(value: float) -> str:
    """A difference of shares in points: ``"+4"``, ``"−12"``, ``"0"``."""
    whole = round(100 * value)
    return f"{whole:+d}".replace("-", "−") if whole else "0"


def _run(verdict: Verdict, id: str, *, most: int, room: int) -> Run:
    by_site = [(label, tables.by_site(verdict, label)) for label in tables.defenses(verdict)]
    utilities = dict.fromkeys(metric.name for setting in verdict.settings for metric in setting.utility)
    return Run(
        id=id,
        verdict=verdict,
        adversary=tables.ADVERSARIES.get(verdict.threat, ""),
        out_of_reach=tuple(tables.out_of_reach(verdict)),
        defenses=tables.defenses(verdict),
        by_defense=tables.by_defense(verdict),
        by_site=tuple((label, matrix) for label, matrix in by_site if matrix.rows),
        findings=tuple(_in_order(verdict)),
        chapters=tuple(_chapters(verdict, id, most=most, room=room)),
        exposure=exposure(verdict),
        scatters=tuple(_scatters(verdict, id)),
        utilities=tuple(utilities),
        armed=any(setting.armed_utility for setting in verdict.settings),
        doubts=tuple(_doubts(verdict.findings)),
        utility=_undefended_utility(verdict),
    )


def _undefended_utility(verdict: Verdict) -> Metric | None:
    found = (tables.headline_utility(s) for s in verdict.settings if s.defense == tables.UNDEFENDED and not s.trap)
    return next((metric for metric in found if metric is not None), None)


def _in_order(verdict: Verdict) -> list[Finding]:
    """All findings by attack, then defence with the undefended first, then all sites before each."""
    attacks = list(dict.fromkeys(finding.attack for finding in verdict.findings))
    labels = tables.defenses(verdict)
    return sorted(verdict.findings, key=lambda f: (attacks.index(f.attack), labels.index(f.defense), bool(f.site)))


def _chapters(verdict: Verdict, id: str, *, most: int, room: int) -> list[tuple[Goal, tuple[AttackView, ...]]]:
    labels = tables.defenses(verdict)
    found = sorted(tables.overall(verdict.findings), key=lambda f: labels.index(f.defense))
    attacks = dict.fromkeys(f.attack for f in tables.overall(verdict.findings))
    chapters = []
    for goal in tables.GOALS:
        groups = [tuple(f for f in found if f.attack == attack and f.goal == goal) for attack in attacks]
        views = [_attack(group, f"{id}-{goal}-{place}", most=most, room=room) for place, group in enumerate(groups) if group]
        if views:
            chapters.append((goal, tuple(views)))
    return chapters


def _attack(findings: tuple[Finding, ...], id: str, *, most: int, room: int) -> AttackView:
    first = findings[0]
    metrics = dict.fromkeys(metric.name for f in findings for metric in (*([f.headline] if f.headline else []), *f.metrics))
    curves = [(defense_name(f.defense), f.roc) for f in findings if f.roc is not None]
    title = f"ROC of the attack {first.attack}"
    return AttackView(
        id=id,
        attack=first.attack,
        name=first.name,
        findings=findings,
        metrics=tuple(metrics),
        roc=figures.roc(curves, id=f"{id}-roc", title=title) if curves else "",
        galleries=tuple(_gallery(finding, most=most, room=room) for finding in findings if finding.pairs),
    )


def _gallery(finding: Finding, *, most: int, room: int) -> Gallery:
    shown = tuple(Shown(pair=pair, views=figures.views(pair, limit=room) if room else None) for pair in finding.pairs[:most])
    return Gallery(finding=finding, shown=shown, left_out=len(finding.pairs) - len(shown))


def _scatters(verdict: Verdict, id: str) -> list[Scatter]:
    groups: dict[tuple[Goal, str], list[figures.Point]] = {}
    for finding in tables.overall(verdict.findings):
        utility, leakage = tables.utility_of(verdict, finding), finding.headline
        if finding.status == "ok" and utility is not None and leakage is not None and leakage.value is not None:
            point = figures.Point(attack=finding.attack, defense=defense_name(finding.defense), utility=utility, leakage=leakage)
            groups.setdefault((finding.goal, leakage.name), []).append(point)
    made = []
    for place, ((goal, metric), points) in enumerate(groups.items()):
        if len({point.defense for point in points}) > 1:
            title = f"{tables.GOALS[goal][0]}: leakage against utility"
            made.append(Scatter(goal=goal, metric=metric, svg=figures.scatter(points, id=f"{id}-scatter-{place}", title=title)))
    return made


def _doubts(findings: Sequence[Finding]) -> list[tuple[str, tuple[str, ...]]]:
    """The caveats of the findings over all sites: each with the attacks and defences it touches."""
    found: dict[str, list[str]] = {}
    for finding in findings:
        if finding.site:
            continue
        where = f"{finding.attack}, {defense_name(finding.defense)}"
        for caveat in finding.caveats:
            found.setdefault(caveat, []).append(where)
    return [(caveat, tuple(where)) for caveat, where in found.items()]


def _compared(verdicts: Sequence[Verdict]) -> tables.Matrix | None:
    """Attack × run over the undefended federations, where there is more than one run."""
    if len(verdicts) < 2:
        return None
    columns = tuple(f"{place}. {verdict.title}" for place, verdict in enumerate(verdicts, 1))
    found: Mapping[tuple[str, str], Finding] = {
        (finding.attack, column): finding
        for column, verdict in zip(columns, verdicts, strict=True)
        for finding in tables.overall(verdict.findings)
        if finding.defense == tables.UNDEFENDED
    }
    return tables.matrix(columns, found)
