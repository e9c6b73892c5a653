"""One node against all others: FedMIA's score, whatever is compared."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flpriv.attacks.membership.gradients import spread as spread_rounds
from flpriv.attacks.membership.gradients import usable
from flpriv.capture import Capture, Observation
from flpriv.errors import CaptureError

FEWEST = 3
"""Nodes that must have replied in a round: two others at least, to tell a mean and a spread."""

Scores = Mapping[int, Mapping[int, Tensor]]
"""Round to node to ``(N,)`` scores, larger means member."""


def compared(scores: Scores, *, trim: float | None) -> dict[int | None, list[Tensor]]:
    """For each node, in each round ``Φ((s_k − μ) / σ)``, with mean and standard deviation of the other nodes' scores.

    A record is scored .5 where the node does exactly as the mean of the others.

    Args:
        scores: of at least three nodes a round.
        trim: leave out those of the others' scores that are more than this many standard deviations from their mean.
    """
    found: dict[int | None, list[Tensor]] = {}
    for of_round in scores.values():
        for node, own in of_round.items():
            others = torch.stack([score for other, score in of_round.items() if other != node])
            mean, spread = others.mean(0), others.std(0)
            if trim is not None:
                kept = (others - mean).abs() <= trim * spread
                enough = kept.sum(0) >= 2
                left = torch.where(kept, others, torch.nan)
                trimmed = left.nanmean(0)
                rest = ((left - trimmed).square().nansum(0) / (kept.sum(0) - 1).clamp_min(1)).sqrt()
                mean, spread = torch.where(enough, trimmed, mean), torch.where(enough, rest, spread)
            found.setdefault(node, []).append(torch.special.ndtr((own - mean) / spread.clamp_min(1e-12)))
    return found


def replies(capture: Capture, *, most: int, who: str) -> list[Observation]:
    """The usable replies of at most ``most`` rounds in which at least three nodes replied.

    Raises:
        CaptureError: naming ``who``, if there is no such round.
    """
    alone = [o for o in usable(capture, most=len(capture.observations), who=who) if o.node is not None]
    by_round = {o.round: [one for one in alone if one.round == o.round] for o in alone}
    enough = [round for round, seen in by_round.items() if len({o.node for o in seen}) >= FEWEST]
    if not enough:
        largest = max((len(seen) for seen in by_round.values()), default=0)
        raise CaptureError(
            f"{who}: compares each client with at least two others, and no round has usable replies of {FEWEST} clients "
            f"(at most {largest}); use update-cosine or loss-threshold for smaller federations and for sums"
        )
    return [o for round in spread_rounds(sorted(enough), most) for o in by_round[round]]
