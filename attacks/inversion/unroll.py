"""What a site does in a round, replayed on trial images and differentiable in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, replace_all_batch_norm_modules_
from torch.nn.modules.dropout import _DropoutNd

from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.state import State, check_like
from flpriv.task import Task


@dataclass(frozen=True, kw_only=True)
class Replay:
    """A site's local training from the model it was sent.

    Args:
        model: the module whose code runs; its own weights do not matter.
        start: the parameters sent, by name.
        rest: every other entry of the model sent (running statistics, counters).
        recipe: the local recipe; its optimiser is SGD.
        batches: which images each local step uses, as indices.
    """

    model: nn.Module
    start: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    recipe: LocalRecipe
    batches: tuple[tuple[int, ...], ...]

    @property
    def images(self) -> int:
        """How many distinct images the round used."""
        return 1 + max(max(batch) for batch in self.batches)

    def of(self, images: int) -> Replay:
        """The same site taking one step on ``images`` images."""
        return dataclasses.replace(self, batches=(tuple(range(images)),))

    def __call__(self, images: Tensor, labels: Tensor) -> list[Tensor]:
        """``(W₀ - W_τ) / lr`` for each parameter in the order of ``start``: the gradient, where there is one plain step.

        Images are ``(N, C, *spatial)``; labels ``(N,)`` class indices or ``(N, classes)`` probabilities. The class weights of a
        balanced loss are a secret of the site and taken to be equal. Works under the transforms of ``torch.func``.
        """

        def loss(weights: dict[str, Tensor], batch: Sequence[int]) -> Tensor:
            rows = torch.tensor(batch, device=images.device)
            logits = functional_call(self.model, {**weights, **self.rest}, (images[rows],))
            return F.cross_entropy(logits, labels[rows])

        weights = dict(self.start)
        velocity: list[Tensor] = []
        moved: list[Tensor] = []
        for step, batch in enumerate(self.batches):
            if step:
                weights = {k: w - self.recipe.lr * v for (k, w), v in zip(weights.items(), velocity, strict=True)}
            descent = grad(loss)(weights, batch)
            force = [descent[k] + self.recipe.weight_decay * w for k, w in weights.items()]
            velocity = [self.recipe.momentum * v + f for v, f in zip(velocity, force, strict=True)] if step else force
            moved = [m + v for m, v in zip(moved, velocity, strict=True)] if step else velocity
        return moved


def replay(task: Task, sent: State, *, recipe: LocalRecipe, examples: int | None, device: torch.device) -> Replay:
    """The replay of one site's round.

    In train mode batch statistics are on and dropout is off: its draws cannot be known.

    Raises:
        FlprivError: for a local optimiser other than SGD, or epochs over an unknown number of examples.
        UpdateError: if the model sent is not the task's.
    """
    if recipe.optimizer != "sgd":
        raise FlprivError(
            f"the sites train with {recipe.optimizer!r}, whose update is no sum of gradients, and this attack replays SGD alone; "
            "set local.optimizer = 'sgd' or leave the attack out"
        )
    model = task.build().to(device)
    check_like(sent, model.state_dict(), who="model sent")
    model.train(recipe.train_mode)
    if recipe.train_mode:
        replace_all_batch_norm_modules_(model)
    for module in model.modules():
        if isinstance(module, _DropoutNd):
            module.eval()
    trained = [name for name, weight in model.named_parameters() if weight.requires_grad]
    model.requires_grad_(False)
    fixed = {name for name, _ in (*model.named_parameters(), *model.named_buffers())}.difference(trained)
    return Replay(
        model=model,
        start={name: sent[name].detach().to(device, copy=True) for name in trained},
        rest={name: sent[name].detach().to(device, copy=True) for name in fixed & sent.keys()},
        recipe=recipe,
        batches=batches(recipe, examples=examples),
    )


def batches(recipe: LocalRecipe, *, examples: int | None) -> tuple[tuple[int, ...], ...]:
    """The images of each local step as indices from 0, every epoch in the same order.

    Where the recipe sets the number of steps, they take new images until ``examples`` are used up, then start again.

    Raises:
        FlprivError: if the recipe counts epochs and ``examples`` is not known.
    """
    if recipe.steps is None and not examples:
        raise FlprivError("the sites train whole epochs and do not say on how many examples; set local.steps")
    size = min(recipe.batch_size, examples or recipe.batch_size)
    most = examples or recipe.batch_size * (recipe.steps or 1)
    images = min(most, recipe.steps * size) if recipe.steps else most
    epoch = [tuple(range(first, min(first + size, images))) for first in range(0, images, size)]
    steps = recipe.steps or recipe.epochs * len(epoch)
    return tuple(epoch[step % len(epoch)] for step in range(steps))
