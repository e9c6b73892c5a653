"""What reconstructions say of the updates they came from: how the images were found, and whether the update depends on them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from flpriv.claim import Reconstruction
from flpriv.finding import Metric
from flpriv.measures.intervals import bootstrap_mean
from flpriv.measures.shares import share_interval

INSENSITIVE = 0.01
"""Below this sensitivity an update hardly depends on the images. Typical: .002 for a deep network with batch norm at its
initialisation, .09 for a ResNet18, .21 for a small CNN."""


@dataclass(frozen=True, kw_only=True)
class Update:
    """One attacked update with the claims about it; ``node`` is ``None`` for a sum over clients."""

    round: int
    node: int | None
    claims: tuple[Reconstruction, ...]

    @property
    def methods(self) -> tuple[str, ...]:
        """How its images were found, where the claims say so; a claim of no images found none."""
        return tuple(dict.fromkeys(claim.method for claim in self.claims if claim.method and len(claim.images)))

    @property
    def sensitivity(self) -> float | None:
        """The mean over the claims that tell it."""
        told = [claim.sensitivity for claim in self.claims if claim.sensitivity is not None]
        return sum(told) / len(told) if told else None


def updates(claims: Sequence[Reconstruction]) -> tuple[Update, ...]:
    """The updates that ``claims`` are about, in order of appearance."""
    about: dict[tuple[int, int | None], list[Reconstruction]] = {}
    for claim in claims:
        about.setdefault((claim.round, claim.node), []).append(claim)
    return tuple(Update(round=round, node=node, claims=tuple(group)) for (round, node), group in about.items())


def metrics(attacked: Sequence[Update], *, seed: int) -> tuple[Metric, ...]:
    """The share of updates inverted by each method that the attack names, and the mean sensitivity of those it is told of.

    How right the images are is no matter here; :mod:`~flpriv.measures.recovery` measures that. Updates of one node are not
    taken for independent.
    """
    found: list[Metric] = []
    for method in dict.fromkeys(method for update in attacked for method in update.methods):
        hits = [method in update.methods for update in attacked]
        low, high = share_interval(hits, [str(update.node) for update in attacked])
        count = (
            f"{sum(hits)} of {_updates(len(hits))} {'was' if sum(hits) == 1 else 'were'} inverted by {method}, as the attack says"
        )
        name = f"fraction of updates inverted by {method}"
        found.append(Metric(name=name, value=sum(hits) / len(hits), low=low, high=high, n=len(hits), note=count))
    if told := [(update.sensitivity, str(update.node)) for update in attacked if update.sensitivity is not None]:
        values, nodes = [value for value, _ in told], [node for _, node in told]
        interval = bootstrap_mean(values, nodes, seed=seed)
        found.append(
            Metric(
                name="mean input sensitivity of the updates, 1 − cos",
                value=sum(values) / len(values),
                low=interval and interval[0],
                high=interval and interval[1],
                n=len(values),
                note=f"between the update and what images of other people give; below {INSENSITIVE:g} it hardly depends on them",
            )
        )
    return tuple(found)


def caveats(attacked: Sequence[Update]) -> list[str]:
    """Why a failure may say little: updates that hardly depend on the images."""
    told = [update.sensitivity for update in attacked if update.sensitivity is not None]
    low = [value for value in told if value < INSENSITIVE]
    if not low:
        return []
    return [
        f"{len(low)} of {_updates(len(told))} hardly {'depends' if len(low) == 1 else 'depend'} on the images "
        f"(sensitivity below {INSENSITIVE:g}): what is not recovered from them is hidden by this model in this round, "
        "not by any protection, and may show in another."
    ]


def _updates(count: int) -> str:
    return "1 update" if count == 1 else f"{count} updates"
