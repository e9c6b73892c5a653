"""What is left of single replies where only their sum is seen: the weighted mean, and nothing of any one node."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

import torch
from torch import Tensor

from flpriv.capture import Observation
from flpriv.state import State


@dataclass(kw_only=True)
class RunningMean:
    """A weighted mean of states that are handed over one after another; float64 inside.

    Entries that are not floating (counters) are those of the first state.
    """

    weight: float = 0.0
    _totals: dict[str, Tensor] = field(default_factory=dict)
    _types: dict[str, torch.dtype] = field(default_factory=dict)

    def add(self, state: State, *, weight: float) -> None:
        """Take ``state`` in; it may be forgotten afterwards."""
        for key in state:
            value = state[key]
            if key not in self._totals:
                self._types[key] = value.dtype
                floating = value.is_floating_point()
                self._totals[key] = value.to(torch.float64, copy=True).mul_(weight) if floating else value.clone()
            elif value.is_floating_point():
                self._totals[key].add_(value, alpha=weight)
        self.weight += weight

    def mean(self) -> dict[str, Tensor]:
        """The mean so far, in the types of the states, empty before the first."""
        return {
            key: (total / self.weight).to(self._types[key]) if total.is_floating_point() else total.clone()
            for key, total in self._totals.items()
        }


class Sum:
    """The sum over the nodes of one round, fed reply by reply.

    Each reply counts by its number of examples, as in federated averaging; where no node tells one, all count the same.
    """

    def __init__(self) -> None:
        self._first: Observation | None = None
        self._alike = True
        self._sent, self._returned = RunningMean(), RunningMean()
        self._examples = 0
        self._trap = ""

    def add(self, seen: Observation) -> None:
        """Take one reply in."""
        weight = float(seen.examples or 0) or 1.0
        if self._first is None:
            self._first = replace(seen, returned={}, metrics={}, labels=None)
        elif self._alike and not _same(seen.sent, self._first.sent):
            self._alike = False
            self._sent.add(self._first.sent, weight=self._returned.weight)
        if not self._alike:
            self._sent.add(seen.sent, weight=weight)
        self._returned.add(seen.returned, weight=weight)
        self._examples += seen.examples or 0
        self._trap = self._trap or seen.trap

    def observation(self) -> Observation | None:
        """The sum as the adversary sees it, ``None`` before the first reply: ``sent`` is the mean of what was sent."""
        if self._first is None:
            return None
        return replace(
            self._first,
            node=None,
            sent=self._first.sent if self._alike else self._sent.mean(),
            returned=self._returned.mean(),
            examples=self._examples or None,
            trap=self._trap,
        )


def _same(one: State, two: State) -> bool:
    """Whether both are made of the very same tensors."""
    return one is two or (one.keys() == two.keys() and all(one[key] is two[key] for key in one))


def sums(observations: Sequence[Observation]) -> tuple[Observation, ...]:
    """One observation for each round, in order; those that are sums already stay as they are."""
    found = []
    for _, behind in groupby(sorted(observations, key=lambda seen: seen.round), key=lambda seen: seen.round):
        total = Sum()
        for seen in behind:
            if seen.node is None:
                found.append(seen)
            else:
                total.add(seen)
        if (one := total.observation()) is not None:
            found.append(one)
    return tuple(found)
