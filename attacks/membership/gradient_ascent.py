"""Gradient ascent: a server makes the model unlearn the records it asks about; a site that holds one learns it back."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional

from flpriv.attack import Attack, Trap
from flpriv.attacks.frozen import frozen, losses
from flpriv.attacks.membership.gradients import candidates as asked_about
from flpriv.attacks.membership.gradients import claims
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError, FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State, add
from flpriv.task import Task
from flpriv.threat import Can

TINY = 1e-12
"""Losses in nats are told apart down to this."""


@dataclass(frozen=True, kw_only=True)
class AscentTrap(Trap):
    """Sends the honest model after a step up the mean loss of some of the candidates.

    Args:
        task: of the federation.
        targets: the candidates.
        gamma: length of the step in units of the gradient.
        groups: candidates take turns, one group of this many a round.
        kept: the last honest model and what was made of it, shared by all nodes of a round.
    """

    task: Task
    targets: Records
    gamma: float
    groups: int
    kept: dict[int, tuple[State, State]] = field(default_factory=dict, repr=False)

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest model moved up the loss of the round's group, to every node; running statistics are left alone."""
        if round not in self.kept or self.kept[round][0] is not honest:
            own = self.targets.take(turn(len(self.targets), round=round, groups=self.groups))
            self.kept.clear()
            self.kept[round] = honest, add(honest, self._ascent(honest, own))
        return self.kept[round][1]

    def _ascent(self, honest: State, own: Records) -> dict[str, Tensor]:
        model = frozen(self.task, honest, who="gradient-ascent: the honest model").requires_grad_(True)
        device = next(model.parameters()).device
        for images, labels in zip(torch.split(own.images, 64), torch.split(own.labels, 64), strict=True):
            loss = functional.cross_entropy(model(images.to(device)), labels.to(device), reduction="sum")
            torch.autograd.backward(self.gamma / len(own) * loss)
        return {key: value.grad.cpu() for key, value in model.named_parameters() if value.grad is not None}


@dataclass(frozen=True, kw_only=True)
class GradientAscent(Attack):
    """Sends models that have unlearned the candidates, and scores each by how far its loss falls back at a site.

    Before sending, ``θ ← θ + γ ∇ mean ℓ(x; θ)`` over a group of candidates; local training brings the loss of a site's own
    records down further than that of others. The score at a node is ``log ℓ(x; sent) − log ℓ(x; returned)`` in eval mode,
    standardised over the group and averaged over the rounds in which it was x's turn; the federation's is the largest of the
    nodes' scores, each standardised, or that of the sum where single replies are not seen. ``threat.tamper_rounds`` decides which
    rounds are tampered with; one alone tells little, and in a model that has seen nothing yet next to nothing. The honest
    strategy receives the honest model plus each update, and so keeps what was learned to repair the damage.

    Args:
        gamma: length of the step; the report tells what armed sites would notice of it. Steps that local training cannot take
            back within a round tell nothing.
        groups: candidates take turns, one of so many groups a round, tampered with or not: group (r-1) mod groups in round r.
            Each group must have a tampered round. Small groups get larger steps each.
    """

    name: ClassVar[str] = "gradient-ascent"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Nasr et al. 2019, https://arxiv.org/abs/1812.00910"

    gamma: Annotated[float, Field(gt=0)] = 0.1
    groups: Annotated[int, Field(ge=1)] = 1

    def aim(self, task: Task, *, public: Records | None, candidates: Records | None, rng: torch.Generator) -> AscentTrap:
        """A trap for ``candidates``.

        Raises:
            FlprivError: if there are none, or fewer than groups.
        """
        count = 0 if candidates is None else len(candidates)
        if candidates is None or count < self.groups:
            raise FlprivError(
                f"{self.name}: {count} candidates for {self.groups} groups; grant 'know-candidates', or lower groups"
            )
        return AscentTrap(task=task, targets=candidates, gamma=self.gamma, groups=self.groups)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node; deterministic.

        A candidate whose turn came in no round that a node replied to is scored 0 there, the mean.

        Raises:
            CaptureError: for a capture without candidates, without a reply to an armed model, or where some group had no round.
            UpdateError: if a captured model is not the task's.
        """
        asked = asked_about(capture, who=self.name)
        seen = [o for o in capture.observations if o.trap]
        missed = set(range(self.groups)) - {(o.round - 1) % self.groups for o in seen}
        if not seen:
            raise CaptureError(f"{self.name}: no reply to an armed model was captured; every site refused it or stayed away")
        if missed:
            raise CaptureError(
                f"{self.name}: {len(missed)} of {self.groups} groups of candidates had no armed round; "
                f"name as many in threat.tamper_rounds, or lower groups"
            )
        found: dict[int | None, list[Tensor]] = {}
        for one in track(seen, self.name):
            rows = turn(len(asked), round=one.round, groups=self.groups)
            own = asked.take(rows)
            before, after = (
                losses(frozen(capture.task, state, who=f"{self.name}: {what} in round {one.round}"), own)
                for what, state in (("sent", one.sent), ("returned", one.returned))
            )
            column = torch.full((len(asked),), torch.nan, dtype=torch.float64)
            fall = before.clamp_min(TINY).log() - after.clamp_min(TINY).log()
            column[rows] = (fall - fall.mean()) / fall.std(correction=0).clamp_min(1e-12)
            found.setdefault(one.node, []).append(column)
        return claims({node: [torch.stack(columns).nanmean(0).nan_to_num(0.0)] for node, columns in found.items()})


def turn(count: int, *, round: int, groups: int) -> list[int]:
    """Whose turn it is: rows of the candidates that ``round`` asks about."""
    return list(range((round - 1) % groups, count, groups))
