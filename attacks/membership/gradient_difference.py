"""Gradient difference: an update gets shorter when the gradient of one of its records is taken out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.membership.gradients import Alongside, alongside, candidates, claims, usable
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Membership
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class GradientDifference(Attack):
    """Scores each candidate by how much shorter the update gets without its gradient: ``2⟨G, g⟩ − ‖g‖²``.

    g is the record's gradient at the model sent, in eval mode, and G the update ``sent − returned`` on the scale of a sum of
    gradients, one for each record behind it, so that ``⟨G, g⟩ ≈ ‖g‖²`` for one of them where gradients of different records are
    nearly orthogonal, as in models with many more parameters than records. What a record's gradient weighs in an update follows
    from the recipe and the number of examples. Where those are not known, or the optimiser is Adam, G is given the length of a
    sum of as many orthogonal gradients as long as the candidates' are on average. Scores are averaged over a node's observations;
    the federation's is the largest of the nodes' scores, each standardised. Traps and unusable updates are left out.

    Args:
        spread: look at no more than this many rounds, spread evenly over those seen; each costs one gradient of every candidate.
        chunk: candidates whose gradients a GPU holds at once.
    """

    name: ClassVar[str] = "gradient-difference"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Li et al. 2022, https://arxiv.org/abs/2202.12967"

    spread: Annotated[int, Field(ge=1)] = 5
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node in squared units of a gradient; deterministic.

        Where only sums over clients are seen there is the claim about the federation alone.

        Raises:
            CaptureError: for a capture without candidates or without a usable update.
            UpdateError: if a model sent is not the task's.
        """
        candidates(capture, who=self.name)
        scores: dict[int | None, list[Tensor]] = {}
        seen = usable(capture, most=self.spread, who=self.name)
        for found in alongside(capture, seen, chunk=self.chunk, who=self.name):
            scores.setdefault(found.seen.node, []).append(2 * found.products / _weight(found) - found.squares)
        return claims(scores)


def _weight(found: Alongside) -> float:
    """What the gradient of one record behind an update weighs in it."""
    weight = weight_of_a_record(found.seen)
    if weight is None:
        weight = found.length / max(1e-30, float(found.squares.mean() * (found.seen.examples or 1)) ** 0.5)
    return weight


def weight_of_a_record(seen: Observation) -> float | None:
    """The factor on one record's gradient in ``sent - returned`` after SGD; ``None`` where it cannot be told.

    With K steps on n records, each step the mean over a batch, that is lr·K/n without momentum; momentum m makes the gradient of
    step k count ``(1 - m**(K-k+1)) / (1 - m)`` times. In a sum over nodes n counts the records of all, and K is that of a node
    of average size.
    """
    local, examples = seen.local, seen.examples
    if local is None or local.optimizer != "sgd" or not examples:
        return None
    nodes = 1 if seen.node is not None else max(1, len(seen.nodes))
    own = max(1, examples // nodes)
    steps = local.epochs * -(-own // local.batch_size) if local.steps is None else local.steps
    used = min(own, steps * local.batch_size) * nodes
    m = local.momentum
    total = sum((1 - m ** (steps - k)) / (1 - m) for k in range(steps))
    return local.lr * total / used
