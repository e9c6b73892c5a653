"""Opening secure aggregation: one node is called alive and dropped, and the shares that come back take both its masks off."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from flpriv.attack import Attack, ProtocolTrap, Trap
from flpriv.capture import Capture
from flpriv.claim import Claim, Goal
from flpriv.errors import FlprivError, ScenarioError, ThreatError
from flpriv.records import Records
from flpriv.registry import create, validate
from flpriv.secure_aggregation import SecureAggregation, Unmask
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can, spell

How = Literal["auto", "both", "split"]


@dataclass(frozen=True, kw_only=True)
class OpeningTrap(ProtocolTrap):
    """Lists nodes on both sides of an unmask request, and sends the model as another trap would.

    Args:
        announced: options in place of those agreed on.
        how: as in :class:`SecAggOpening`.
        inner: the trap in the model, if there is one.
    """

    announced: Mapping[str, Any]
    how: How
    inner: Trap | None

    def announce(self, agreed: SecureAggregation, *, round: int) -> SecureAggregation:
        """The agreed options with some replaced."""
        return replace(agreed, **self.announced)

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """What the other trap sends, the honest model without one."""
        return self.inner.arm(honest, round=round, node=node, nodes=nodes) if self.inner else None

    def disarm(self, returned: State, *, sent: State, honest: State) -> State:
        """As the other trap does."""
        if self.inner is None:
            return super().disarm(returned, sent=sent, honest=honest)
        return self.inner.disarm(returned, sent=sent, honest=honest)

    @property
    def secrets(self) -> Mapping[str, Tensor]:
        """Of the other trap."""
        return self.inner.secrets if self.inner else {}

    def unmask(self, honest: Mapping[int, Unmask], *, round: int, nodes: Sequence[int], threshold: int) -> Mapping[int, Unmask]:
        """Requests that call each of ``nodes`` that is alive dropped as well, before all who hold its shares or half of them."""
        alive = {node: list(request.alive) for node, request in honest.items()}
        dropped = {node: list(request.dropped) for node, request in honest.items()}
        ring = sorted(honest)
        for place, target in enumerate(ring):
            if target not in nodes:
                continue
            holders = [node for node in [*ring[place:], *ring[:place]] if target in honest[node].alive]
            half = holders[(len(holders) + 1) // 2 :]
            split = len(half) >= threshold and all(len(alive[node]) > threshold for node in half)
            if split and self.how != "both":
                for node in half:
                    alive[node].remove(target)
                    dropped[node].append(target)
            elif self.how != "split":
                for node in holders:
                    dropped[node].append(target)
        return {node: Unmask(alive=tuple(alive[node]), dropped=tuple(dropped[node])) for node in honest}


@dataclass(frozen=True, kw_only=True)
class SecAggOpening(Attack):
    """Opens SecAgg+ with unmask requests that name a node alive and dropped at once, then inverts its update with another attack.

    Shares of a node's own mask are given for nodes alive, shares of the key behind its pairwise masks for those dropped. With
    both, what the node sent is its update, to the rounding of the protocol; the round's sum stays what it was.

    Args:
        then: the attack on the updates opened, by name; if it has a trap in the model, that is sent as well.
        options: of that attack.
        how: every holder of shares is asked for ``"both"`` kinds, or they are ``"split"`` into halves that are asked for one
            each, so that no request contradicts itself: that takes a threshold of half the shares or less. ``"auto"`` splits
            where it can.
        announce: options of secure aggregation that the server tells the sites in place of those agreed on: a small
            ``clipping_range`` and a ``max_weight`` near their number of images cost an update that is opened the least precision,
            and a ``reconstruction_threshold`` of half the shares lets requests be split.
    """

    name: ClassVar[str] = "secagg-opening"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.KNOW_LOCAL
    paper: ClassVar[str] = (
        "what the protocol of Bonawitz et al. 2017 (https://eprint.iacr.org/2017/281) rules out by a consistency check, "
        "tried on Flower's SecAgg+"
    )
    secure_aggregation: ClassVar[bool] = True

    then: str = "tuned-matching"
    options: Mapping[str, Any] = field(default_factory=dict)
    how: How = "auto"
    announce: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        validate(SecureAggregation, self.announce, where=f"attack {self.name!r}: announce")
        if self.then == self.name or self.inner.goal is not self.goal:
            raise ScenarioError(f"attack {self.name!r}: then = {self.then!r}: must be another attack that rebuilds images")

    @property
    def inner(self) -> Attack:
        """The attack on the updates opened.

        Raises:
            ScenarioError: for an unknown name or option.
        """
        made: Attack = create("attacks", self.then, self.options)
        return made

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """As the other attack has it."""
        return self.inner.architecture(model, task)

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> OpeningTrap:
        """A trap in the protocol, around that of the other attack."""
        return OpeningTrap(announced=self.announce, how=self.how, inner=self.inner.trap(task, public=public, rng=rng))

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        """The other attack's claims about the nodes that were opened.

        Raises:
            FlprivError: if none was.
            ThreatError: if the other attack needs what is not granted.
        """
        inner = self.inner
        passive = type(inner).trap is Attack.trap
        opened = [replace(seen, trap="" if passive else seen.trap) for seen in capture.observations if seen.opened]
        if not opened:
            raise FlprivError(
                f"{self.name}: no update was opened; the sites would not help to unmask, or (how = {self.how!r}) too few of them "
                "hold shares for the threshold"
            )
        granted = capture.granted | Can.SEE_UPDATES
        if missing := inner.needs & ~granted:
            raise ThreatError(f"{self.name}: {self.then!r} needs '{spell(missing)}', which the threat model does not grant")
        return inner.run(replace(capture, granted=granted, observations=tuple(opened)), rng=rng)
