"""Source inference: among the sites' own models, the one that fits a training record best is its own site's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen, losses
from flpriv.capture import Capture
from flpriv.claim import Attribute, Goal
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class SourceInference(Attack):
    """Guesses which client a training record comes from: the one whose returned model has the lowest loss on it.

    ``argmin_k ℓ(x; returned_k)`` in eval mode, in one round that is fixed beforehand: the best of several rounds would be chosen
    by the truth. Scored on members, against the chance of one in the number of clients and the share of the largest site. Where
    the sites' class shares differ, a local model prefers its site's labels, and part of the success is the label. More local
    steps and later rounds, in which sites fit their own records, make it stronger. It needs no record with a known site.

    Args:
        round: whose replies are looked at; ``None`` is the last round in which two clients or more replied to the honest model.
    """

    name: ClassVar[str] = "source-inference"
    goal: ClassVar[Goal] = Goal.ATTRIBUTE
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Hu et al. 2021, https://arxiv.org/abs/2109.05659"

    round: Annotated[int, Field(ge=1)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Attribute]:
        """One claim about the attribute ``"source"``: classes are the nodes' pseudonyms, probabilities softmax(−loss).

        Raises:
            CaptureError: for a capture without candidates, or without honest replies of two clients in the round.
            UpdateError: if a model returned is not the task's.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        honest = [o for o in capture.observations if o.node is not None and not o.trap]
        rounds = [o.round for o in honest if self.round in (None, o.round)]
        told = [round for round in sorted(set(rounds)) if rounds.count(round) > 1]
        if not told:
            where = "any round" if self.round is None else f"round {self.round}"
            raise CaptureError(
                f"{self.name}: compares clients' replies to the honest model, and the capture holds no two of {where}; "
                "it works on single updates alone, not on sums"
            )
        seen = [o for o in honest if o.round == told[-1]]
        found = []
        for one in track(seen, self.name):
            model = frozen(capture.task, one.returned, who=f"{self.name}: node {one.node} in round {one.round}")
            found.append(-losses(model, capture.candidates))
        return [
            Attribute(
                attribute="source",
                classes=tuple(str(one.node) for one in seen),
                probabilities=torch.softmax(torch.stack(found, 1), 1),
                probe=f"loss of the models returned in round {told[-1]}",
            )
        ]
