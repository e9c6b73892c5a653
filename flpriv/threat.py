"""What an adversary sees, knows and may do, and the threat models that have names in the literature."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Flag, auto

from flpriv.errors import ScenarioError, near


class Can(Flag):
    """One capability of the adversary; capabilities combine with ``|``."""

    SEE_FINAL = auto()
    """The global model after the last round."""
    SEE_MODELS = auto()
    """The global model of every round, and so the sum of all replies to it, sums that a trap left in included."""
    SEE_UPDATES = auto()
    """Each client's own reply in every round, not only their aggregate."""
    KNOW_LOCAL = auto()
    """The local recipe: optimiser, learning rate, batch size, number of local steps, loss."""
    KNOW_DEFENSES = auto()
    """Which defences the sites use, in order and with their options; never their noise. One that changes the agreed model is part
    of the task, and known to everybody."""
    KNOW_LABELS = auto()
    """The labels of the records behind each update."""
    KNOW_ORDER = auto()
    """Which labels belong to which local step, in order."""
    KNOW_PUBLIC = auto()
    """Labelled images of the same modality from patients of no audited site."""
    KNOW_CANDIDATES = auto()
    """Records whose membership or origin is asked about."""
    KNOW_EXPOSED = auto()
    """A small share of every site's training records with their site, sex and age."""
    TAMPER = auto()
    """Choose the model each client receives, its definition included."""


DESCRIPTIONS = {
    Can.SEE_FINAL: "sees the final global model",
    Can.SEE_MODELS: "sees the global model of every round",
    Can.SEE_UPDATES: "sees every client's own update",
    Can.KNOW_LOCAL: "knows the local recipe (optimiser, learning rate, batch size, steps)",
    Can.KNOW_DEFENSES: "knows which defences the sites use and how strong",
    Can.KNOW_LABELS: "knows the labels of the records behind an update",
    Can.KNOW_ORDER: "knows the order of the local batches",
    Can.KNOW_PUBLIC: "holds public images of the same modality",
    Can.KNOW_CANDIDATES: "holds candidate records and asks whether they were trained on",
    Can.KNOW_EXPOSED: "holds a small labelled share of every site's training records",
    Can.TAMPER: "chooses the model that clients receive",
}
"""Each capability in plain words, for reports."""

_USER = Can.SEE_FINAL | Can.KNOW_PUBLIC | Can.KNOW_CANDIDATES | Can.KNOW_EXPOSED
_SUMS = _USER | Can.SEE_MODELS | Can.KNOW_LOCAL
_CURIOUS = _SUMS | Can.SEE_UPDATES | Can.KNOW_DEFENSES
NAMED = {
    "model-user": _USER,
    "sums-only": _SUMS,
    "honest-but-curious": _CURIOUS,
    "malicious-server": _CURIOUS | Can.TAMPER,
    "malicious-sums-only": _SUMS | Can.KNOW_DEFENSES | Can.TAMPER,
}
"""The named threat models, the passive ones before the malicious ones."""


@dataclass(frozen=True, kw_only=True)
class Threat:
    """A threat model: a name and the capabilities it grants."""

    name: str
    granted: Can

    def lines(self) -> list[str]:
        """What this adversary can do, one plain sentence part per capability."""
        return [text for can, text in DESCRIPTIONS.items() if can in self.granted]


def threat(model: str, *, grant: Iterable[str] = (), deny: Iterable[str] = ()) -> Threat:
    """The threat model called ``model``, with capabilities added or taken away by name (``"know-labels"``).

    Raises:
        ScenarioError: for an unknown model or capability.
    """
    if model not in NAMED:
        raise ScenarioError(f"threat.model: unknown threat model {model!r}{near(model, NAMED)}")
    granted = NAMED[model]
    for name in grant:
        granted |= capability(name)
    for name in deny:
        granted &= ~capability(name)
    return Threat(name=model, granted=granted)


def capability(name: str) -> Can:
    """The capability written ``"know-labels"`` (or ``KNOW_LABELS``).

    Raises:
        ScenarioError: if there is none of that name.
    """
    key = name.upper().replace("-", "_")
    if key not in Can.__members__:
        raise ScenarioError(f"threat: unknown capability {name!r}{near(name, map(spell, Can))}")
    return Can[key]


def spell(can: Can) -> str:
    """``Can.SEE_UPDATES | Can.TAMPER`` as ``"see-updates, tamper"``."""
    return ", ".join(str(one.name).lower().replace("_", "-") for one in can)
