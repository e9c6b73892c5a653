"""The exposure table: what attribute attacks read off the model, beside what it is worth, for every way it was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from flpriv.arrangement import FEDERATED, RESERVED, Arrangement, arrangement_of
from flpriv.claim import Goal
from flpriv.finding import Finding, Metric, SettingResult, Verdict
from flpriv.report import tables

WORDS: Mapping[Arrangement, str] = {
    "centralised": "Centralised",
    "siloed": "Siloed",
    "iid": "Federated, IID",
    "federated": "Federated, own sites",
    "untrained": "Untrained",
}
"""How a model was trained, in words; rows of the table stand in this order."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attack on one setting.

    Args:
        finding: over all sites, ``None`` where the attack was not run.
    """

    finding: Finding | None

    def metric(self, name: str) -> Metric | None:
        """The finding's metric of that name, where it has a value."""
        if self.finding is None or self.finding.status != "ok":
            return None
        known = [*self.finding.metrics, *([self.finding.headline] if self.finding.headline else [])]
        return next((metric for metric in known if metric.name == name and metric.value is not None), None)

    @property
    def accuracy(self) -> Metric | None:
        """Of the attack on held-out records."""
        return self.metric("accuracy")

    @property
    def f1(self) -> Metric | None:
        """Mean F1 over the classes."""
        return self.metric("macro F1")

    @property
    def lift(self) -> Metric | None:
        """Accuracy over the best baseline's."""
        return self.metric("lift over the best baseline")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One setting.

    Args:
        name: how it was trained, in words; a defence on top of federated learning begins with ``+``.
        auroc: of the model at its own task, on held-out images.
        balanced: its balanced accuracy there.
        cells: one for each attack.
    """

    name: str
    auroc: Metric | None
    balanced: Metric | None
    cells: tuple[Cell, ...]


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A guess that needs no trained model, and its accuracy against each attack's question; ``None`` where it was not tried."""

    name: str
    accuracies: tuple[float | None, ...]


@dataclass(frozen=True, kw_only=True)
class Exposure:
    """The table: settings down, attacks across, baselines underneath.

    Args:
        attacks: their labels.
        counts: of each attack, how many classes and how many held-out records.
        rows: one for each setting.
        baselines: as met in the undefended federation, or where there is none in the first row that has them.
    """

    attacks: tuple[str, ...]
    counts: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]
    baselines: tuple[Baseline, ...]


def exposure(verdict: Verdict) -> Exposure | None:
    """The table of a verdict, ``None`` where no attribute attack scored on two settings."""
    found = {
        (finding.attack, finding.defense): finding
        for finding in verdict.findings
        if finding.goal is Goal.ATTRIBUTE and not finding.site
    }
    scored = [(attack, stack) for (attack, stack), finding in found.items() if finding.status == "ok" and finding.confusion]
    attacks = [attack for attack in dict.fromkeys(attack for attack, _ in scored) if sum(one == attack for one, _ in scored) > 1]
    if not attacks:
        return None
    stacks = dict.fromkeys(stack for attack, stack in found if attack in attacks)
    settings = {setting.id: setting for setting in verdict.settings}
    order = list(WORDS)
    ranked = sorted(
        stacks,
        key=lambda stack: (
            order.index(arrangement_of(stack)),
            sum(part not in RESERVED for part in stack.split("+") if part != tables.UNDEFENDED),
        ),
    )
    rows = tuple(
        Row(
            name=in_words(stack, settings.get(stack)),
            auroc=_utility(settings.get(stack), "AUROC"),
            balanced=_utility(settings.get(stack), "balanced accuracy"),
            cells=tuple(Cell(finding=found.get((attack, stack))) for attack in attacks),
        )
        for stack in ranked
    )
    shown = [
        next(f for stack in (tables.UNDEFENDED, *ranked) if (f := found.get((attack, stack))) and f.confusion)
        for attack in attacks
    ]
    return Exposure(
        attacks=tuple(attacks),
        counts=tuple((len(f.confusion.classes) if f.confusion else 0, f.headline.n if f.headline else 0) for f in shown),
        rows=rows,
        baselines=_baselines(shown),
    )


def in_words(stack: str, setting: SettingResult | None = None) -> str:
    """How a stack of ``compare`` was trained: ``"Siloed (north)"``, ``"Federated, own sites"``, ``"+ dp-sgd"``."""
    arrangement = arrangement_of(stack)
    name = WORDS[arrangement]
    if arrangement == "siloed" and setting is not None and setting.nodes:
        name += f" ({setting.nodes[0]})"
    defenses = [label for label in stack.split("+") if label not in RESERVED and label != tables.UNDEFENDED]
    if not defenses:
        return name
    return " ".join(["" if arrangement == FEDERATED else name, *(f"+ {label}" for label in defenses)]).strip()


def _utility(setting: SettingResult | None, name: str) -> Metric | None:
    metrics = setting.utility if setting is not None else ()
    return next((metric for metric in metrics if metric.name == name and metric.value is not None), None)


def _baselines(shown: Sequence[Finding]) -> tuple[Baseline, ...]:
    known = [dict(finding.confusion.baselines) if finding.confusion else {} for finding in shown]
    names = dict.fromkeys(name for accuracies in known for name in accuracies)
    return tuple(Baseline(name=name, accuracies=tuple(accuracies.get(name) for accuracies in known)) for name in names)
