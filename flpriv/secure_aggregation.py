"""Secure aggregation: its options, what a server asks sites to unmask, and what a site can tell of such a request.

The protocol is SecAgg+ (Bell et al. 2020) as Flower has it. Its messages are four a round and site: keys, shares of secrets
among neighbours, the masked update, and the request for the shares that take masks off.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from flpriv.errors import ScenarioError

MODULUS = 2**32
"""Masked entries are counted modulo this."""
CONFIGS, STATE = "secaggplus_configs", "secaggplus_state"
"""The records in which Flower keeps the protocol: of a message, and of what a site remembers."""


@dataclass(frozen=True, kw_only=True)
class Numbers:
    """What a server announces at the start of a round, and every site masks by.

    Args:
        shares: among how many nodes each splits its secrets.
        threshold: how many shares give a secret away.
        clipping_range: largest absolute value of a weighted entry.
        steps: into how many whole numbers that range is divided.
        max_weight: number of examples that weighs 1.
    """

    shares: int
    threshold: int
    clipping_range: float
    steps: int
    max_weight: float


@dataclass(frozen=True, kw_only=True)
class SecureAggregation:
    """``[federation.secure_aggregation]``: how updates are masked.

    What is masked is the update, not the model, weighted by ``examples / max_weight`` and rounded to whole numbers. One step of
    them is worth ``2 clipping_range / quantization_range * max_weight / examples`` in an entry of a single update.

    Args:
        num_shares: among how many nodes each splits its secrets, itself among them: a number ≥ 3, or a share of the nodes asked,
            in (0, 1].
        reconstruction_threshold: how many of those give a secret away together: a number ≥ 2, or a share of ``num_shares``, in
            (0, 1]. At half or less, a server can tell one half of the nodes that a node is alive, and the other that it is not.
        clipping_range: largest absolute value of a weighted entry, > 0; what is beyond is clipped.
        quantization_range: number of steps, ≥ 2; times the number of nodes it must stay below 2 ** 32. Where it is not given it
            is as large as that allows while leaving room for weights of 16. Flower's own workflow takes 2 ** 22.
        max_weight: number of examples that weighs 1, > 0; near the largest site's it costs the least precision.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    num_shares: Annotated[int, Field(ge=3, strict=True)] | Annotated[float, Field(gt=0, le=1)] = 1.0
    reconstruction_threshold: Annotated[int, Field(ge=2, strict=True)] | Annotated[float, Field(gt=0, le=1)] = 2 / 3
    clipping_range: Annotated[float, Field(gt=0)] = 8.0
    quantization_range: Annotated[int, Field(ge=2, le=2**30)] | None = None
    max_weight: Annotated[float, Field(gt=0)] = 1000.0

    def shares(self, nodes: int) -> int:
        """Among how many of ``nodes`` each splits its secrets: all of them, or an odd number, half to each side in a ring."""
        wanted = round(self.num_shares * nodes) if isinstance(self.num_shares, float) else self.num_shares
        return nodes if wanted >= nodes or wanted < 3 else wanted | 1

    def threshold(self, nodes: int) -> int:
        """How many shares give a secret away, at least 2."""
        if isinstance(self.reconstruction_threshold, int):
            return self.reconstruction_threshold
        return max(2, round(self.reconstruction_threshold * self.shares(nodes)))

    def steps(self, nodes: int) -> int:
        """The number of steps where so many nodes are added up."""
        return self.quantization_range or 2 ** max(1, (MODULUS // (16 * nodes)).bit_length() - 1)

    def numbers(self, nodes: int) -> Numbers:
        """What is announced to so many nodes."""
        return Numbers(
            shares=self.shares(nodes),
            threshold=self.threshold(nodes),
            clipping_range=float(self.clipping_range),
            steps=self.steps(nodes),
            max_weight=float(self.max_weight),
        )

    def check(self, sites: int) -> None:
        """Raise unless ``sites`` can run the protocol.

        Raises:
            ScenarioError: naming the option.
        """
        where = "federation.secure_aggregation"
        if sites < 2:
            raise ScenarioError(f"{where}: a sum over {sites} site hides nothing; it needs two or more")
        if self.threshold(sites) > self.shares(sites):
            raise ScenarioError(
                f"{where}: reconstruction_threshold = {self.reconstruction_threshold} of {self.shares(sites)} shares "
                "can never be met; lower it"
            )
        if self.steps(sites) * sites >= MODULUS:
            most = (MODULUS - 1) // sites
            raise ScenarioError(
                f"{where}: quantization_range = {self.quantization_range}: a sum over {sites} sites overflows; at most {most}"
            )


@dataclass(frozen=True, kw_only=True)
class Unmask:
    """What a server asks one node in the last stage: for shares of the own masks of those alive, and of the keys of the dropped.

    Either kind of shares alone keeps a node's update masked; both kinds together open it.

    Args:
        alive: nodes said to have sent their masked update.
        dropped: nodes said to have sent none.
    """

    alive: tuple[int, ...]
    dropped: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Unmasking:
    """An unmask request as a site sees it, with what it remembers of the round.

    Args:
        node: the site's own pseudonym.
        asked: what the server asks.
        shared: the nodes whose shares the site holds, itself among them.
        nodes: how many take part, as the server announced it.
        numbers: what else it announced.
    """

    node: int
    asked: Unmask
    shared: frozenset[int]
    nodes: int
    numbers: Numbers


def unmasking(configs: Mapping[str, Any], state: Mapping[str, Any]) -> Unmasking | None:
    """The request in a message's ``configs``, told with a site's ``state``; ``None`` if the message is of another stage.

    Args:
        configs: the record :data:`CONFIGS` of the message.
        state: the record :data:`STATE` of the site's context.
    """
    if configs.get("stage") != "unmask":
        return None
    alive, dropped = (tuple(map(int, configs.get(key, ()))) for key in ("active_nids", "dead_nids"))
    return Unmasking(
        node=int(state.get("nid", 0)),
        asked=Unmask(alive=alive, dropped=dropped),
        shared=frozenset(map(int, state.get("rd_seed_share_dict:K", ()))),
        nodes=int(state.get("sample_num", 0)),
        numbers=Numbers(
            shares=int(state.get("share_num", 0)),
            threshold=int(state.get("threshold", 0)),
            clipping_range=float(state.get("clipping_range", 0)),
            steps=int(state.get("target_range", 0)),
            max_weight=float(state.get("max_weight", 0)),
        ),
    )
