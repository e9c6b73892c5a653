"""A federation as an adversary repeats it on records of its own: federated averaging in plain PyTorch, on one thread."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, islice, pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.capture import Capture
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.seeds import derive
from flpriv.state import State
from flpriv.sums import RunningMean
from flpriv.task import Task

ASSUMED = LocalRecipe(optimizer="adam", lr=1e-3, batch_size=16)
"""How an adversary who saw no training takes a model to have been trained."""


@dataclass(frozen=True, kw_only=True)
class Course:
    """How a federation is trained.

    Args:
        shares: of the training records, one for each node, summing to 1.
        examples: training records of all nodes together, ``None`` where not known.
        rounds: how many.
        recipe: of each node.
    """

    shares: tuple[float, ...]
    examples: int | None
    rounds: int
    recipe: LocalRecipe


def course(capture: Capture, *, epochs: int) -> Course:
    """What the capture tells of the training it is of; an adversary who saw none takes it to be central, by Adam."""
    honest = [seen for seen in capture.observations if not seen.trap]
    recipe = next((seen.local for seen in honest if seen.local is not None), None)
    if recipe is None:
        return Course(shares=(1.0,), examples=None, rounds=1, recipe=replace(ASSUMED, epochs=epochs))
    last = max(seen.round for seen in honest)
    rounds = max(last, len(capture.models) - 1)
    first = [seen for seen in honest if seen.round == honest[0].round]
    total = sum(seen.examples or 0 for seen in first)
    if first[0].node is not None and all(seen.examples for seen in first):
        return Course(shares=tuple((seen.examples or 0) / total for seen in first), examples=total, rounds=rounds, recipe=recipe)
    nodes = max(1, len(first[0].nodes) if first[0].node is None else len(first))
    return Course(shares=(1 / nodes,) * nodes, examples=total or None, rounds=rounds, recipe=recipe)


def federate(task: Task, course: Course, records: Records, *, start: State | None, seed: int) -> dict[str, Tensor]:
    """The last global model of a federation over ``records``, dealt out to nodes at random.

    Averages are weighted by records, running statistics included, as Flower's FedAvg does. The global random state is left as
    it was.

    Args:
        task: what is learnt.
        course: how; a node whose share is less than one record takes no part.
        records: at least one.
        start: the first global model; ``None`` draws one from ``seed``.
        seed: of the deal, the order of batches, dropout and the first model.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = task.build(seed=derive(seed, "start")).to(device)
    if start is not None:
        model.load_state_dict(dict(start))
    layout = torch.channels_last if records.images.dim() == 4 else torch.channels_last_3d
    for parameter in model.parameters():
        if parameter.dim() == records.images.dim():
            parameter.data = parameter.data.contiguous(memory_format=layout)
    images, labels = records.images.to(device).contiguous(memory_format=layout), records.labels.to(device)
    rng = torch.Generator().manual_seed(derive(seed, "order"))
    nodes = _deal(len(records), course.shares, rng)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    with torch.random.fork_rng(devices=[device] if device == "cuda" else []):
        torch.manual_seed(derive(seed, "noise"))
        for _ in range(course.rounds):
            mean = RunningMean()
            for rows in nodes:
                model.load_state_dict(state)
                _train(model, images[rows], labels[rows], course.recipe, classes=len(task.classes), rng=rng)
                mean.add(model.state_dict(), weight=len(rows))
            state = mean.mean()
    return {key: value.cpu().contiguous() for key, value in state.items()}


def _train(model: nn.Module, images: Tensor, labels: Tensor, recipe: LocalRecipe, *, classes: int, rng: torch.Generator) -> None:
    """The local loop of a site, in place."""
    model.train(recipe.train_mode)
    optimizer: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        optimizer = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        optimizer = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    weight = _weights(labels, classes) if recipe.loss == "balanced-cross-entropy" else torch.ones(classes, device=labels.device)
    for rows in _batches(len(labels), recipe, rng):
        optimizer.zero_grad()
        loss = functional.cross_entropy(model(images[rows]), labels[rows], weight=weight, reduction="none").mean()
        torch.autograd.backward(loss)
        optimizer.step()


def _weights(labels: Tensor, classes: int) -> Tensor:
    """Inverse to the frequencies of the classes that occur, mean 1 over the records."""
    counts = torch.bincount(labels, minlength=classes).float()
    return torch.where(counts > 0, len(labels) / ((counts > 0).sum() * counts.clamp_min(1)), 0.0)


def _batches(count: int, recipe: LocalRecipe, rng: torch.Generator) -> Iterator[Tensor]:
    def epochs() -> Iterator[Tensor]:
        for _ in range(recipe.epochs if recipe.steps is None else recipe.steps):
            yield from torch.split(torch.randperm(count, generator=rng), recipe.batch_size)

    return islice(epochs(), recipe.steps)


def _deal(count: int, shares: Sequence[float], rng: torch.Generator) -> list[Tensor]:
    """Rows of each node that gets any."""
    ends = [round(count * end) for end in accumulate(shares)]
    ends[-1] = count
    order = torch.randperm(count, generator=rng)
    return [order[low:high] for low, high in pairwise([0, *ends]) if high > low]
