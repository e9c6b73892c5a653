"""What the adversary holds after a federation: the seam between training and attacking.

Captures are written by the wiretap (:mod:`flpriv.strategies.wiretap`) and read back by :func:`flpriv.store.open_capture`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flpriv.canary import Canaries
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import State, difference
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One reply, as the adversary saw it. What the threat model does not grant is ``None``.

    Args:
        round: 1, 2, ….
        node: Flower's node id, a pseudonym that never tells the site; ``None`` for a sum over all clients of the round.
        sent: the model the node received, tampered with or not.
        returned: the model it sent back; for a sum, ``sent`` plus the weighted mean update.
        examples: the number of examples the node claims.
        metrics: further numbers in its reply.
        local: the local recipe.
        defenses: (name, options) of the sites' defences, the one that touched the update first in front; ``()`` for none.
        labels: ``(steps, batch)`` flattened in order of use where the order is granted, sorted otherwise.
        trap: label of the attack whose trap was delivered in this message, ``""`` for the honest model; of a sum, in any message.
        nodes: the nodes that were asked in this round and might get a trap, in the order the trap was told.
        opened: whether a trap in secure aggregation took the masks off; whoever tampers then sees the reply, granted or not.
    """

    round: int
    node: int | None
    sent: State
    returned: State
    examples: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    local: LocalRecipe | None = None
    defenses: tuple[tuple[str, Mapping[str, Any]], ...] | None = None
    labels: Tensor | None = None
    trap: str = ""
    nodes: tuple[int, ...] = ()
    opened: bool = False

    @property
    def update(self) -> dict[str, Tensor]:
        """``returned - sent`` over parameters; running statistics and counters are left out."""
        return difference(self.returned, self.sent)


@dataclass(frozen=True, kw_only=True)
class Capture:
    """Everything an attack gets.

    Args:
        granted: the capabilities of the adversary; what they do not cover is missing below.
        task: what the federation learns.
        observations: replies, by round and node (with ``Can.SEE_UPDATES``), or one sum over the nodes of each round (with
            ``Can.SEE_MODELS`` alone).
        models: global models: the initial one and one a round with ``Can.SEE_MODELS``; the last alone with ``Can.SEE_FINAL``.
        public: labelled images of patients of no audited site (``Can.KNOW_PUBLIC``).
        candidates: records asked about, without ids or attributes (``Can.KNOW_CANDIDATES``).
        exposed: training records with attributes ``"site"``, ``"sex"``, ``"age"`` (``Can.KNOW_EXPOSED``).
        secrets: what the operator's own trap kept for its read-out.
        canaries: all that an auditor may have planted, in or not, where the attack brought some.
    """

    granted: Can
    task: Task
    observations: tuple[Observation, ...] = ()
    models: tuple[State, ...] = ()
    public: Records | None = None
    candidates: Records | None = None
    exposed: Records | None = None
    secrets: Mapping[str, Tensor] = field(default_factory=dict)
    canaries: Canaries | None = None

    @property
    def final(self) -> State:
        """The last global model.

        Raises:
            ThreatError: if no model is granted.
        """
        from flpriv.errors import ThreatError

        if not self.models:
            raise ThreatError("this capture holds no global model; grant 'see-final' or 'see-models'")
        return self.models[-1]

    @property
    def nodes(self) -> tuple[int, ...]:
        """The pseudonyms of all nodes seen or asked, sorted."""
        seen = {o.node for o in self.observations if o.node is not None}
        return tuple(sorted(seen | {node for o in self.observations for node in o.nodes}))
