"""The contract of an attack, and of a trap: what a malicious operator sends instead of the honest model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar, final

import torch
from pydantic import ConfigDict
from torch import Tensor

from flpriv.canary import Canaries
from flpriv.capture import Capture
from flpriv.claim import Claim, Goal
from flpriv.errors import ThreatError
from flpriv.records import Records
from flpriv.secure_aggregation import SecureAggregation, Unmask
from flpriv.state import State, add, difference
from flpriv.task import Task
from flpriv.threat import Can, spell

if TYPE_CHECKING:
    from torch import nn


class Trap(ABC):
    """What is sent, to whom and when. Armed messages are new states: the honest one is never changed in place."""

    @abstractmethod
    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The state to send to ``node`` in ``round``, or ``None`` to send the honest one.

        Args:
            honest: what the honest strategy sends it.
            round: 1, 2, ….
            node: pseudonym.
            nodes: all nodes that may get a trap in this round, ``node`` among them; observations name them in the same order.
        """

    def disarm(self, returned: State, *, sent: State, honest: State) -> State:
        """What the honest strategy is given in place of ``returned``: the honest model plus the update of the layers it shares.

        Keeps keys, shapes and dtypes of ``honest``; running statistics and counters are the honest ones.
        """
        shared = {k: v for k, v in sent.items() if k in honest and v.shape == honest[k].shape}
        return add(honest, difference({k: returned[k] for k in shared}, shared))

    @property
    def secrets(self) -> Mapping[str, Tensor]:
        """What the operator keeps for the read-out, stored with its capture."""
        return {}


class ProtocolTrap(Trap):
    """A trap in the messages of secure aggregation: whoever of the nodes it opens is captured as an observation of its own.

    The model is sent as it is unless :meth:`arm` is overridden too.
    """

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state."""
        return None

    def announce(self, agreed: SecureAggregation, *, round: int) -> SecureAggregation:
        """The options that sites are told to mask by: those agreed on, unless a trap wants a lower threshold or finer numbers."""
        return agreed

    @abstractmethod
    def unmask(self, honest: Mapping[int, Unmask], *, round: int, nodes: Sequence[int], threshold: int) -> Mapping[int, Unmask]:
        """What each node is asked in place of ``honest``.

        A node is opened where at least ``threshold`` nodes that hold its shares are told that it is alive, and as many, the same
        or others, that it dropped. The round has a sum only if the first holds for all nodes that are alive.

        Args:
            honest: node to what the protocol asks it; together it names all nodes that share secrets with it, itself included.
            round: 1, 2, ….
            nodes: all nodes that may be opened in this round.
            threshold: how many shares give a secret away.
        """


class Attack(ABC):
    """An attack: a frozen dataclass whose fields are its options. A plugin writes :meth:`run` and nothing else.

    Class attributes: ``name`` (as in scenarios), ``goal``, ``needs`` (capabilities without which it cannot run), ``paper``;
    ``secure_aggregation`` where it is an attack on that, and needs a federation that runs it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: ClassVar[str]
    goal: ClassVar[Goal]
    needs: ClassVar[Can]
    paper: ClassVar[str]
    secure_aggregation: ClassVar[bool] = False

    @abstractmethod
    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Claim]:
        """Make claims from the capture alone; all randomness comes from ``rng``, and the capture is not altered."""

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> Trap | None:
        """For an active attack, what the operator sends; ``None`` for a passive one."""
        return None

    def aim(self, task: Task, *, public: Records | None, candidates: Records | None, rng: torch.Generator) -> Trap | None:
        """:meth:`trap` for an operator who holds the records asked about; override it in place of :meth:`trap` to use them.

        Args:
            task: of the federation.
            public: images of patients of no site, where granted.
            candidates: what the capture will hold as candidates, in the same order, where granted.
            rng: of all randomness.
        """
        return self.trap(task, public=public, rng=rng)

    def canaries(self, task: Task, *, model: nn.Module, public: Records | None, rng: torch.Generator) -> Canaries | None:
        """For an audit with canaries, what one site plants; ``None`` for an attack without.

        Args:
            task: what the federation learns.
            model: the initial global model.
            public: images of patients of no site, ``None`` where there are none.
            rng: of everything random.
        """
        return None

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """The model definition the operator ships with its trap; by default the agreed one, unchanged."""
        return model

    @final
    def __call__(self, capture: Capture, *, seed: int = 0) -> list[Claim]:
        """Run with the needs checked.

        Raises:
            ThreatError: if the capture does not grant what the attack needs.
        """
        if missing := self.needs & ~capture.granted:
            raise ThreatError(f"{self.name} needs '{spell(missing)}', which the threat model does not grant")
        return list(self.run(capture, rng=torch.Generator().manual_seed(seed)))
