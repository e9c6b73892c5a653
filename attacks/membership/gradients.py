"""Gradients of single records beside the updates that may hold them, and what scores of several rounds come to.

Of each record's gradient g and each update's descent D = sent - returned three numbers are kept: ⟨g, D⟩, ‖g‖² and ‖D‖.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from flpriv.attacks.frozen import frozen
from flpriv.capture import Capture, Observation
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.records import Records


@dataclass(frozen=True, kw_only=True)
class Gradients:
    """What is kept of N gradients beside U directions; float64 on the CPU.

    Args:
        products: ``(N, U)`` inner products of gradients and directions.
        squares: ``(N,)`` squared norms of the gradients, ≥ 0.
        lengths: ``(U,)`` norms of the directions, ≥ 0.
    """

    products: Tensor
    squares: Tensor
    lengths: Tensor

    @property
    def cosines(self) -> Tensor:
        """``(N, U)`` in [-1, 1], 0 where a gradient or a direction is zero."""
        return self.products / (self.squares.sqrt()[:, None] * self.lengths).clamp_min(1e-30)


def gradients(
    model: nn.Module,
    records: Records,
    directions: Sequence[Mapping[str, Tensor]] = (),
    *,
    chunk: int = 8,
    at_once: bool | None = None,
) -> Gradients:
    """The gradients of the loss of each record, one pass for all ``directions``; exact for any model in eval mode.

    Records pass one by one on a CPU, which is faster there than per-sample transforms of convolutions.

    Args:
        model: where the gradients are taken, in the mode it is in.
        records: N of them.
        directions: over parameters of the model, all over the same ones; those that they leave out are left out of the norms too.
        chunk: records in a pass where several go at once.
        at_once: whether several records go in one pass, by default on a GPU alone.
    """
    device = next(model.parameters()).device
    at_once = device.type == "cuda" if at_once is None else at_once
    names = directions[0].keys() if directions else dict(model.named_parameters()).keys()
    weights = {key: value.detach().requires_grad_() for key, value in model.named_parameters() if key in names}
    rest = {key: value for key, value in (*model.named_parameters(), *model.named_buffers()) if key not in weights}
    along = {key: torch.stack([d[key].to(device).flatten() for d in directions]) for key in weights} if directions else {}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, (weights, rest), (image[None],)), label[None])

    def one_by_one(images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        for image, label in zip(images, labels, strict=True):
            value = loss(weights, image.to(device), label.to(device))
            found = torch.autograd.grad(value, list(weights.values()), materialize_grads=True)
            yield {key: part[None] for key, part in zip(weights, found, strict=True)}

    def together(images: Tensor, labels: Tensor) -> Iterator[dict[str, Tensor]]:
        each = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")
        for x, y in zip(torch.split(images, chunk), torch.split(labels, chunk), strict=True):
            yield each({key: value.detach() for key, value in weights.items()}, x.to(device), y.to(device))

    products, squares = [], []
    for part in (together if at_once else one_by_one)(records.images, records.labels):
        flat = {key: value.flatten(1) for key, value in part.items()}
        squares.append(_sum([_squares(value) for value in flat.values()]))
        none = squares[-1].new_zeros(len(squares[-1]), 0)
        products.append(_sum([(flat[key] @ along[key].T).double() for key in along]) if along else none)
    lengths = _sum([_squares(value) for value in along.values()]).sqrt() if along else torch.zeros(0)
    return Gradients(products=torch.cat(products).cpu(), squares=torch.cat(squares).cpu(), lengths=lengths.double().cpu())


@dataclass(frozen=True, kw_only=True)
class Alongside:
    """The gradients of all candidates at the model sent, beside one update.

    Args:
        seen: the observation.
        products: ``(N,)`` inner products with ``sent - returned``.
        squares: ``(N,)`` squared norms of the gradients.
        length: norm of the update.
    """

    seen: Observation
    products: Tensor
    squares: Tensor
    length: float

    @property
    def cosines(self) -> Tensor:
        """``(N,)`` in [-1, 1], 0 where a gradient is zero."""
        return self.products / (self.squares.sqrt() * self.length).clamp_min(1e-30)


def alongside(capture: Capture, seen: Sequence[Observation], *, chunk: int, who: str) -> Iterator[Alongside]:
    """Every observation beside the gradients of the candidates, which are taken once for all that were sent the same model.

    Args:
        capture: with candidates.
        seen: observations.
        chunk: records whose gradients a GPU holds at once.
        who: for progress and errors.

    Raises:
        CaptureError: for a capture without candidates.
        UpdateError: if a model sent is not the task's.
    """
    asked = candidates(capture, who=who)
    for group in track(_by_model(seen), who):
        model = frozen(capture.task, group[0].sent, who=f"{who}: the model of round {group[0].round}")
        descents = [{key: -value for key, value in one.update.items()} for one in group]
        found = gradients(model, asked, descents, chunk=chunk)
        for place, one in enumerate(group):
            yield Alongside(
                seen=one, products=found.products[:, place], squares=found.squares, length=float(found.lengths[place])
            )


def candidates(capture: Capture, *, who: str) -> Records:
    """The records asked about.

    Raises:
        CaptureError: naming ``who``, if there are none.
    """
    if capture.candidates is None or not len(capture.candidates):
        raise CaptureError(f"{who}: the capture holds no candidates")
    return capture.candidates


def usable(capture: Capture, *, most: int, who: str) -> list[Observation]:
    """Observations of at most ``most`` rounds, evenly spread, without traps and without updates that are zero or not finite.

    Raises:
        CaptureError: naming ``who``, if none is left.
    """
    seen = [o for o in capture.observations if not o.trap and _moved(o.update)]
    if not seen:
        raise CaptureError(f"{who}: the capture holds no usable update: none was honest, finite and other than zero")
    rounds = set(spread(sorted({o.round for o in seen}), most))
    return [o for o in seen if o.round in rounds]


def spread(rounds: Sequence[int], most: int) -> list[int]:
    """``most`` of the rounds, evenly spread, the first and the last among them."""
    if len(rounds) <= most:
        return list(rounds)
    return sorted({rounds[i] for i in torch.linspace(0, len(rounds) - 1, most).round().long().tolist()})


def claims(scores: Mapping[int | None, Sequence[Tensor]]) -> list[Membership]:
    """The claim about the federation, then one per node: each node's mean over its rounds.

    The federation's is the largest of the nodes' means, each standardised over the candidates.

    Args:
        scores: node (``None`` for a sum over nodes) to ``(N,)`` scores, one for each of its observations.
    """
    means = {node: torch.stack(list(columns)).mean(0) for node, columns in scores.items()}
    standard = [(score - score.mean()) / score.std().clamp_min(1e-12) for score in means.values()]
    federation = Membership(scores=torch.stack(standard).amax(0))
    return [federation, *(Membership(scores=score, node=node) for node, score in means.items() if node is not None)]


def _moved(update: Mapping[str, Tensor]) -> bool:
    return all(bool(value.isfinite().all()) for value in update.values()) and any(bool(value.any()) for value in update.values())


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


def _squares(rows: Tensor) -> Tensor:
    """Squared norms of ``rows`` ``(N, P)``, float64; summed in their own precision, for copies of large layers cost more."""
    return torch.einsum("np,np->n", rows, rows).double()
