"""What measures conclude and reports show."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from flpriv.claim import Goal

Status = Literal["ok", "failed", "refused", "not granted"]


class Level(IntEnum):
    """How bad a finding is; ordered."""

    UNKNOWN = -1
    NONE = 0
    LOW = 1
    MEDIUM = 2
    HIGH = 3
    CRITICAL = 4


@dataclass(frozen=True, kw_only=True)
class Metric:
    """A number with its interval, sample size and null.

    Args:
        name: ``"PSNR"``, ``"fraction at PSNR ≥ 30 dB"``, ``"AUC"``, ….
        value: ``None`` where the sample cannot resolve it; reads "n/a".
        low: lower end of the 95 % interval, ``None`` where there is none.
        high: its upper end.
        n: sample size (images, candidates, …).
        unit: ``"dB"``, ``"%"`` or empty; fractions are kept in [0, 1].
        null: what an adversary without the evidence reaches.
        null_name: what that is (``"best of 128 public images"``, ``"chance"``, ``"untrained backbone"``).
        second_null: what another such adversary reaches; it may be more than ``null``.
        second_null_name: what that is (``"mean public image"``).
        note: why a value is missing, or what to keep in mind.
    """

    name: str
    value: float | None
    low: float | None = None
    high: float | None = None
    n: int = 0
    unit: str = ""
    null: float | None = None
    null_name: str = ""
    second_null: float | None = None
    second_null_name: str = ""
    note: str = ""

    @property
    def best_null(self) -> float | None:
        """The larger of both nulls: the one to beat."""
        return max((null for null in (self.null, self.second_null) if null is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One original with its best reconstruction.

    Args:
        original: ``(C, *spatial)`` float32 in [0, 1].
        reconstruction: the same shape; zeros where no claim was assigned.
        null: the best an adversary without the update offers for this original.
        psnr: of the reconstruction, dB.
        ssim: of the reconstruction.
        null_psnr: of the null, dB.
        null_ssim: of the null.
        site: whose image.
        rank: place of the true patient among all images by similarity to the reconstruction, 1 is found.
        rdlv: relative data leakage value, ``None`` where the prior is hardly alike the original.
    """

    original: NDArray[np.float32]
    reconstruction: NDArray[np.float32]
    null: NDArray[np.float32]
    psnr: float
    ssim: float
    null_psnr: float
    null_ssim: float
    site: str
    rank: int | None = None
    rdlv: float | None = None


@dataclass(frozen=True, kw_only=True)
class Roc:
    """A ROC curve from (0, 0) to (1, 1); ties make diagonal steps."""

    fpr: NDArray[np.float64]
    tpr: NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Confusion:
    """Counts, rows are true classes and columns guesses; ``baselines`` gives each baseline's accuracy by name."""

    classes: tuple[str, ...]
    counts: NDArray[np.int64]
    accuracy: float
    baselines: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class Group:
    """Membership among the people of one kind: whether they are at more risk than others.

    Args:
        attribute: ``"sex"``, ``"age"``, ….
        value: ``"F"``, ``"60-79"``, ….
        members: candidates of the group that were trained on.
        others: those that were not.
        auc: of telling them apart.
        strict: true positive rate at a low false positive rate.
    """

    attribute: str
    value: str
    members: int
    others: int
    auc: Metric
    strict: Metric


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One attack on one setting, over all sites (``site`` empty) or one.

    Args:
        attack: label of the attack in the scenario.
        name: registered name of the attack.
        goal: what it is after.
        setting: id of the federation it attacked.
        defense: label of the defence there, ``"none"`` without.
        site: name, or empty for all sites together.
        status: ``"ok"``, ``"failed"`` (the attack raised), ``"refused"`` (a defence kept every client away), or
            ``"not granted"`` (the threat model does not allow it).
        headline: the metric that decides the level.
        metrics: all metrics, the headline among them.
        level: how bad; set by :mod:`flpriv.risk`.
        threshold: the rule that gave the level, in words.
        message: why it failed or was refused.
        caveats: reasons to doubt the result.
        pairs: reconstructions, best first.
        roc: for membership.
        confusion: for attributes.
        groups: for membership, the same by sex and age.
        seconds: how long the attack took.
    """

    attack: str
    name: str
    goal: Goal
    setting: str
    defense: str = "none"
    site: str = ""
    status: Status = "ok"
    headline: Metric | None = None
    metrics: tuple[Metric, ...] = ()
    level: Level = Level.UNKNOWN
    threshold: str = ""
    message: str = ""
    caveats: tuple[str, ...] = ()
    pairs: tuple[Pair, ...] = ()
    roc: Roc | None = None
    confusion: Confusion | None = None
    groups: tuple[Group, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Event:
    """Something that happened in a federation and a reader should know: a dropout, a refusal, a NaN update."""

    round: int
    who: str
    what: str


@dataclass(frozen=True, kw_only=True)
class SettingResult:
    """One federation that was run.

    Args:
        id: folder name.
        defense: label, ``"none"`` without.
        trap: label of the active attack delivered in it, or empty.
        recipe: the local recipe in words (``"1 step of batch 4, SGD lr 0.05"``).
        rounds: how many were run.
        utility: held-out metrics of the final model (``"balanced accuracy"``, ``"AUROC"``, ``"accuracy"``).
        train_utility: the same on training records.
        armed_utility: held-out metrics of the model that armed sites received, as they would see them if they tried it; the null
            is the honest model in its place.
        epsilon: claimed epsilon by site, where a defence accounts for it.
        seconds: wall time of training.
        events: what went wrong or was refused.
        nodes: who trained: names of the sites, or of the nodes that the setting's arrangement has in their place.
    """

    id: str
    defense: str
    trap: str
    recipe: str
    rounds: int
    utility: tuple[Metric, ...]
    train_utility: tuple[Metric, ...] = ()
    armed_utility: tuple[Metric, ...] = ()
    epsilon: Mapping[str, float] = field(default_factory=dict)
    seconds: float = 0.0
    events: tuple[Event, ...] = ()
    nodes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class SiteSummary:
    """One site in numbers, for the report's description of the federation."""

    name: str
    patients: int
    train: int
    test: int
    public: int
    classes: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Everything the report shows.

    Args:
        title: the scenario's name.
        sentence: the verdict in words, with the level.
        level: the worst level over findings without a defence.
        threat: name of the threat model.
        adversary: what the adversary could see and do, one part of a sentence each.
        task: modality, shape, classes and model in words.
        sites: who took part.
        settings: the federations that were run.
        findings: all findings, the one over all sites before those per site.
        caveats: reasons to doubt the results.
        methods: attack or defence name to (one line description, paper).
        provenance: command, seed, versions, date and machine, as text by name.
        scenario: the resolved scenario as TOML.
    """

    title: str
    sentence: str
    level: Level
    threat: str
    adversary: tuple[str, ...]
    task: str
    sites: tuple[SiteSummary, ...]
    settings: tuple[SettingResult, ...]
    findings: tuple[Finding, ...]
    caveats: tuple[str, ...] = ()
    methods: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    provenance: Mapping[str, str] = field(default_factory=dict)
    scenario: str = ""
