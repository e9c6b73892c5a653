"""Local training: the plain PyTorch loop that defences reshape before it starts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, islice, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from flpriv.clients.metrics import class_weights
from flpriv.defense import Loop
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.seeds import derive

Prepare = Callable[[Loop], Loop]
"""What a defence does to the loop before the first step."""


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What local training leaves behind, besides the changed model.

    Args:
        steps: rows of the site's training records used in each local step, in order.
        loss: mean over all records used of the loss before their step; 0 where none was used.
    """

    steps: tuple[tuple[int, ...], ...]
    loss: float


def train(
    model: nn.Module,
    records: Records,
    recipe: LocalRecipe,
    *,
    classes: int,
    seed: int,
    mu: float = 0.0,
    prepare: Prepare | None = None,
    device: torch.device | str = "cpu",
) -> Trained:
    """Train ``model`` in place by ``recipe``; equal seeds see equal batches, whatever ``prepare`` does to the update.

    The global random state (dropout) is seeded for the training and then left as it was.

    Args:
        model: on ``device``. A defence may wrap it or hook into it; its own parameters are what is sent back.
        records: the site's training records, at least one.
        recipe: how to train.
        classes: number of classes.
        seed: of the batches' order and of dropout.
        mu: weight of FedProx' proximal term, ≥ 0; 0 leaves it out.
        prepare: reshapes the loop.
        device: where to compute.
    """
    devices = [device] if torch.device(device).type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(derive(seed, "noise"))
        model.train(recipe.train_mode)
        loop = Loop(
            model=model,
            optimizer=optimizer(model, recipe, mu=mu),
            loader=loader(records, recipe, seed=derive(seed, "order")),
            loss=loss(recipe, records.labels.to(device), classes),
        )
        return _run(prepare(loop) if prepare else loop, recipe, device)


def optimizer(model: nn.Module, recipe: LocalRecipe, *, mu: float = 0.0) -> torch.optim.Optimizer:
    """The recipe's optimiser over the parameters of ``model``; FedProx' ``mu / 2 * |w - w0|²`` draws them back to their start.

    The pull joins the gradient just before each step, so that a defence which clips gradients per record does not see it.
    """
    chosen: torch.optim.Optimizer
    if recipe.optimizer == "adam":
        chosen = torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    else:
        chosen = torch.optim.SGD(model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay)
    if mu:
        origin = [(parameter, parameter.detach().clone()) for parameter in model.parameters()]

        def pull(*_: Any) -> None:
            for parameter, start in origin:
                if parameter.grad is not None:
                    parameter.grad.add_(parameter.detach() - start, alpha=mu)

        chosen.register_step_pre_hook(pull)
    return chosen


def loader(records: Records, recipe: LocalRecipe, *, seed: int) -> DataLoader[Any]:
    """Shuffled batches ``(images, labels, rows)``, reshuffled every epoch; the last one may be smaller."""
    stack = TensorDataset(records.images, records.labels, torch.arange(len(records)))
    return DataLoader(stack, batch_size=recipe.batch_size, shuffle=True, generator=torch.Generator().manual_seed(seed))


def loss(recipe: LocalRecipe, labels: Tensor, classes: int) -> Callable[[Tensor, Tensor], Tensor]:
    """The recipe's loss of ``(logits, labels)``: a mean over the batch, so that each record counts by its own weight alone.

    Args:
        recipe: names the loss.
        labels: of all the site's training records, for the class weights.
        classes: number of classes.
    """
    if recipe.loss == "cross-entropy":
        return functional.cross_entropy
    weight = class_weights(labels, classes)
    return lambda logits, truth: functional.cross_entropy(logits, truth, weight=weight, reduction="none").mean()


def _run(loop: Loop, recipe: LocalRecipe, device: torch.device | str) -> Trained:
    steps, total = [], torch.zeros((), device=device)
    for images, labels, rows in _batches(loop.loader, recipe):
        loop.optimizer.zero_grad()
        value = loop.loss(loop.model(images.to(device)), labels.to(device))
        torch.autograd.backward(value)
        loop.optimizer.step()
        steps.append(tuple(rows.tolist()))
        if len(rows):  # Poisson sampling draws empty batches, whose mean loss is not a number
            total += value.detach() * len(rows)
    for finish in loop.finish:
        finish()
    return Trained(steps=tuple(steps), loss=float(total) / max(1, sum(map(len, steps))))


def _batches(loader: DataLoader[Any], recipe: LocalRecipe) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    if recipe.steps is None:
        return chain.from_iterable(repeat(loader, recipe.epochs))
    return islice(chain.from_iterable(repeat(loader)), recipe.steps)
