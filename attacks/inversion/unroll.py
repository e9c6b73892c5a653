"""What a site does in a round, replayed on trial images and differentiable in them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
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
        recipe: the local recipe.
        batches: which images each local step uses, as indices, every epoch alike.
        class_weights: ``(classes,)`` of a balanced loss; ``None`` takes them to be equal.
        blur: share of its root mean square below which a gradient moves a weight less under Adam than Adam would: without any,
            an update is all but the sign of a gradient and has no slope; ≥ 0.
    """

    model: nn.Module
    start: Mapping[str, Tensor]
    rest: Mapping[str, Tensor]
    recipe: LocalRecipe
    batches: tuple[tuple[int, ...], ...]
    class_weights: Tensor | None = None
    blur: float = 0.0

    @property
    def images(self) -> int:
        """How many distinct images the round used."""
        return 1 + max(max(batch) for batch in self.batches)

    @property
    def epoch(self) -> tuple[tuple[int, ...], ...]:
        """The batches of one pass over the images."""
        return tuple(dict.fromkeys(self.batches))

    @property
    def epochs(self) -> int:
        """Passes over the images begun."""
        return -(-len(self.batches) // len(self.epoch))

    def of(self, images: int) -> Replay:
        """The same site taking one step on ``images`` images."""
        return dataclasses.replace(self, batches=(tuple(range(images)),))

    def __call__(self, images: Tensor, labels: Tensor, course: Tensor | None = None) -> list[Tensor]:
        """``(W₀ - W_τ) / lr`` for each parameter in the order of ``start``: the gradient, where there is one plain step of SGD.

        Works under the transforms of ``torch.func`` and in the wider of the types of the parameters and the images.

        Args:
            images: ``(N, C, *spatial)``.
            labels: ``(N,)`` class indices or ``(N, classes)`` probabilities.
            course: ``(epochs, N)`` the image at each place of :attr:`epoch` in each pass; ``None`` for the same order throughout.
        """

        def loss(weights: dict[str, Tensor], rows: Tensor) -> Tensor:
            logits = functional_call(self.model, {**weights, **self.rest}, (images[rows],))
            return self._loss(logits, labels[rows])

        take = _adam if self.recipe.optimizer == "adam" else _sgd
        weights, moved = dict(self.start), [torch.zeros_like(w) for w in self.start.values()]
        memory: list[list[Tensor]] = []
        for step, batch in enumerate(self.batches):
            if step:
                weights = {k: torch.add(w, m, alpha=-self.recipe.lr) for (k, w), m in zip(self.start.items(), moved, strict=True)}
            rows = torch.tensor(batch, device=images.device)
            if course is not None:
                rows = course[step // len(self.epoch)][rows]
            slopes = list(grad(loss)(weights, rows).values())
            if decay := self.recipe.weight_decay:
                slopes = [torch.add(g, w, alpha=decay) for g, w in zip(slopes, weights.values(), strict=True)]
            taken, memory = take(slopes, memory, self.recipe, step, self.blur)
            moved = [m + t for m, t in zip(moved, taken, strict=True)] if step else taken
        return moved

    def _loss(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.class_weights is None:
            return F.cross_entropy(logits, labels)
        return F.cross_entropy(logits, labels, weight=self.class_weights.to(logits.dtype), reduction="none").mean()


def _sgd(
    slopes: list[Tensor], memory: list[list[Tensor]], recipe: LocalRecipe, step: int, blur: float
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """One step of ``torch.optim.SGD`` in units of the learning rate, and the velocity."""
    if not recipe.momentum:
        return slopes, memory
    velocity = [torch.add(g, v, alpha=recipe.momentum) for g, v in zip(slopes, memory[0], strict=True)] if step else slopes
    return velocity, [velocity]


def _adam(
    slopes: list[Tensor], memory: list[list[Tensor]], recipe: LocalRecipe, step: int, blur: float
) -> tuple[list[Tensor], list[list[Tensor]]]:
    """One step of ``torch.optim.Adam`` at its default betas and eps in units of the learning rate, and both its moments."""
    first, second = memory if step else ([torch.zeros_like(g) for g in slopes], [torch.zeros_like(g) for g in slopes])
    first = [0.9 * m + 0.1 * g for m, g in zip(first, slopes, strict=True)]
    second = [0.999 * v + 0.001 * g.square() for v, g in zip(second, slopes, strict=True)]
    taken = []
    for m, v in zip(first, second, strict=True):
        square = v / (1 - 0.999 ** (step + 1))
        floor = blur**2 * square.mean() + 1e-30  # a square root has no slope at 0
        taken.append(m / (1 - 0.9 ** (step + 1)) / ((square + floor).sqrt() + 1e-8))
    return taken, [first, second]


def replay(task: Task, sent: State, *, recipe: LocalRecipe, examples: int | None, device: torch.device) -> Replay:
    """The replay of one site's round, true to it; a search under Adam follows its slope with some ``blur`` alone.

    In train mode batch statistics are on and dropout is off: its draws cannot be known.

    Raises:
        FlprivError: for epochs over an unknown number of examples.
        UpdateError: if the model sent is not the task's.
    """
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
        start={name: _own(sent[name], device) for name in trained},
        rest={name: _own(sent[name], device) for name in fixed & sent.keys()},
        recipe=recipe,
        batches=batches(recipe, examples=examples),
    )


def _own(value: Tensor, device: torch.device) -> Tensor:
    """A copy, in float32 where it was sent in half precision."""
    half = value.dtype in (torch.float16, torch.bfloat16)
    return value.detach().to(device, torch.float32 if half else value.dtype, copy=True)


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
