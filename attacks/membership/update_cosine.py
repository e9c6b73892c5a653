"""Update cosine: a site's update points along the gradients of the records it trained on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class UpdateCosine(Attack):
    """Scores each candidate by the cosine between its own gradient at the model sent and the update that came back.

    For a record x and a node, ``cos(∇ℓ(x; sent), sent − returned)`` is averaged over the node's observations: the claim about the
    node. The claim about the federation is the largest of the nodes' scores, each standardised over the candidates. Gradients are
    taken in eval mode. Messages that carried a trap and updates that are zero or not finite are left out.

    Args:
        spread: look at no more than this many rounds, spread evenly over those seen; each costs one gradient of every candidate.
        chunk: candidates whose gradients are held in memory at once.
    """

    name: ClassVar[str] = "update-cosine"
    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Li et al. 2022, https://arxiv.org/abs/2202.12967"

    spread: Annotated[int, Field(ge=1)] = 5
    chunk: Annotated[int, Field(ge=1)] = 8

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """The claim about the federation, scores ``(N,)``, then one per node, scores in [-1, 1]; deterministic.

        Where only sums over clients are seen there is the claim about the federation alone.

        Raises:
            CaptureError: for a capture without candidates or without a usable update.
            UpdateError: if a model sent is not the task's.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        seen = [o for o in capture.observations if not o.trap and _usable(o.update)]
        if not seen:
            raise CaptureError(f"{self.name}: the capture holds no usable update: none was honest, finite and other than zero")
        rounds = _spread(sorted({o.round for o in seen}), self.spread)
        scores: dict[int | None, list[Tensor]] = {}
        for group in track(_by_model([o for o in seen if o.round in rounds]), self.name):
            model = frozen(capture.task, group[0].sent, who=f"{self.name}: the model of round {group[0].round}")
            columns = cosines(model, capture.candidates, [o.update for o in group], chunk=self.chunk).unbind(1)
            for observation, column in zip(group, columns, strict=True):
                scores.setdefault(observation.node, []).append(column)
        means = {node: torch.stack(columns).mean(0) for node, columns in scores.items()}
        standard = [(score - score.mean()) / score.std().clamp_min(1e-12) for score in means.values()]
        federation = Membership(scores=torch.stack(standard).amax(0))
        return [federation, *(Membership(scores=score, node=node) for node, score in means.items() if node is not None)]


def cosines(model: nn.Module, records: Records, updates: Sequence[Mapping[str, Tensor]], *, chunk: int) -> Tensor:
    """Cosine of each record's loss gradient with minus each update: ``(N, len(updates))`` float64, 0 where the gradient is zero.

    Args:
        model: where the gradients are taken, in the mode it is in.
        records: N of them.
        updates: over some of the model's parameters.
        chunk: records whose gradients are held at once.
    """
    device = next(model.parameters()).device
    weights: dict[str, Tensor] = {key: value for key, value in model.named_parameters() if key in updates[0]}
    rest = {key: value for key, value in (*model.named_parameters(), *model.named_buffers()) if key not in weights}
    directions = {key: torch.stack([-update[key].to(device).flatten() for update in updates], 1) for key in weights}
    lengths = _sum([direction.double().square().sum(0) for direction in directions.values()]).sqrt()

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, (weights, rest), (image[None],)), label[None])

    each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
    found = []
    for images, labels in zip(torch.split(records.images, chunk), torch.split(records.labels, chunk), strict=True):
        gradients = {key: value.flatten(1) for key, value in each(weights, images.to(device), labels.to(device)).items()}
        products = _sum([(gradients[key] @ directions[key]).double() for key in weights])
        norms = _sum([value.double().square().sum(1) for value in gradients.values()]).sqrt()
        found.append((products / (norms[:, None] * lengths).clamp_min(1e-30)).cpu())
    return torch.cat(found)


def _usable(update: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in update.values()) and any(bool(value.any()) for value in update.values())


def _spread(rounds: Sequence[int], most: int) -> set[int]:
    """``most`` of the rounds, evenly spread, the first and the last among them."""
    if len(rounds) <= most:
        return set(rounds)
    return {rounds[i] for i in torch.linspace(0, len(rounds) - 1, most).round().long().tolist()}


def _by_model(observations: Sequence[Observation]) -> list[list[Observation]]:
    """Observations of one round that were sent the same model, so that its gradients are taken once."""
    groups: list[list[Observation]] = []
    for seen in observations:
        for group in groups:
            first = group[0]
            if first.round == seen.round and all(torch.equal(value, first.sent[key]) for key, value in seen.sent.items()):
                group.append(seen)
                break
        else:
            groups.append([seen])
    return groups


def _sum(parts: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(parts)).sum(0)
