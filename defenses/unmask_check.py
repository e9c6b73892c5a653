"""Look at what a server asks to unmask under secure aggregation, and refuse what would open a single update."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import ClassVar, Literal

from flpriv.defense import Defense, Local, Refusal
from flpriv.secure_aggregation import Unmasking


@dataclass(frozen=True, kw_only=True)
class UnmaskCheck(Defense):
    """Refuse an unmask request of SecAgg+ that names a node alive and dropped, or nodes other than those that shared secrets.

    In this order: no node twice; the site itself alive; together exactly the nodes whose shares the site holds; as many alive as
    the threshold. Then a threshold of more than half the shares: below, a server can tell one half of the nodes that a node is
    alive and the other half that it dropped, and no node sees both. Then, where the agreed options are known, numbers other than
    those: the server announces them in every round, and finer ones show more of an update that is opened.

    It stands before Flower's mod: ``ClientApp(mods=[UnmaskCheck(), secaggplus_mod, ...])``. What one site sees is all it judges:
    it cannot tell invented nodes from real ones, nor whether others were sent another model.

    Args:
        majority: refuse a threshold of half the shares or less.
    """

    name: ClassVar[str] = "unmask-check"
    acts_on: ClassVar[Literal["protocol"]] = "protocol"
    paper: ClassVar[str] = (
        "the requests that Bonawitz et al. 2017 (https://eprint.iacr.org/2017/281) forbid; "
        "SecAgg+: Bell et al. 2020 (https://eprint.iacr.org/2020/704)"
    )

    majority: bool = True

    def unmask(self, request: Unmasking, *, local: Local) -> Refusal | None:
        """The first reason against the request, without pseudonyms; ``None`` for an honest one."""
        alive, dropped = request.asked.alive, request.asked.dropped
        if both := set(alive) & set(dropped):
            return Refusal(reason=f"{_nodes(len(both))} named both alive and dropped; the answer would open single updates")
        if max(Counter(alive + dropped).values(), default=0) > 1:
            return Refusal(reason="the unmask request names a node twice")
        if request.node in dropped:
            return Refusal(reason="the unmask request calls this site dropped, which has sent its masked update")
        if strange := (set(alive) | set(dropped)) - request.shared:
            return Refusal(reason=f"{_nodes(len(strange))} named in the unmask request that shared no secret with this site")
        if left_out := request.shared - set(alive) - set(dropped):
            return Refusal(reason=f"{_nodes(len(left_out))} left out of the unmask request that shared secrets with this site")
        told = request.numbers
        if len(alive) < told.threshold:
            return Refusal(reason=f"{len(alive)} nodes are alive, fewer than the threshold of {told.threshold}")
        if self.majority and 2 * told.threshold <= told.shares:
            return Refusal(
                reason=f"a threshold of {told.threshold} of {told.shares} shares lets the server ask one half of the nodes "
                "for one kind of shares and the other half for the other; raise it above half"
            )
        agreed = local.secure_aggregation and local.secure_aggregation.numbers(request.nodes)
        for name, value in asdict(agreed).items() if agreed else ():
            if getattr(told, name) != value:
                return Refusal(reason=f"the server announced {name} = {getattr(told, name):g}, agreed is {value:g}")
        return None


def _nodes(count: int) -> str:
    return f"{count} node is" if count == 1 else f"{count} nodes are"
