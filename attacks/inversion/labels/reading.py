"""What an update says through its last layer, and what images of one's own say at the same models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.func import functional_call

from flpriv.attacks.inversion.labels.last_layer import LastLayer, layer_of, names_of
from flpriv.attacks.inversion.unroll import Replay
from flpriv.errors import FlprivError

_PLACES = 5
"""At how many models between the one sent and the one returned a course of many steps is looked at."""
_LEAN = 4
"""Guesses' worth of all guesses together in the mark of a class."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """One update, ready for every way to read labels from it.

    Args:
        site: replays the round.
        observed: ``(W₀ - W_τ) / lr`` in the order of ``site.start``.
        classes: of the task.
        guesses: images like those looked for, ``(M, C, *spatial)``.
        guessed: their labels ``(M,)``, -1 where unknown.
    """

    site: Replay
    observed: Sequence[Tensor]
    classes: int
    guesses: Tensor
    guessed: Tensor

    @property
    def images(self) -> int:
        """How many distinct images the round used."""
        return self.site.images

    @property
    def labelled(self) -> bool:
        """Whether any guess has a label: whether the guesses are real images."""
        return bool((self.guessed >= 0).any())

    @cached_property
    def sent(self) -> LastLayer:
        """The last layer sent."""
        return layer_of(self.site.start, classes=self.classes)

    @cached_property
    def course(self) -> tuple[tuple[float, float], ...]:
        """(weight, place) of the local steps, weights summing to 1.

        A step's gradient counts by how long momentum carries it; its place is the share of the whole way that the model has gone
        before, under a steady force. Neighbouring steps are taken together.
        """
        return course(len(self.site.batches), momentum=self.site.recipe.momentum)

    @cached_property
    def moved(self) -> LastLayer:
        """``(W₀ - W_τ) / lr`` of the last layer."""
        return layer_of(dict(zip(self.site.start, self.observed, strict=True)), classes=self.classes)

    @cached_property
    def gradient(self) -> LastLayer:
        """The mean gradient of the images: momentum's sum and weight decay are taken out."""
        steps, momentum = len(self.site.batches), self.site.recipe.momentum
        force = self.moved.scaled(1 / sum((1 - momentum ** (step + 1)) / (1 - momentum) for step in range(steps)))
        decay = self.site.recipe.weight_decay
        return force if not decay else force.plus(self.at(sum(w * place for w, place in self.course)), times=-decay)

    @cached_property
    def mark(self) -> Tensor:
        """:meth:`LastLayer.mark` of the gradient, ``(classes,)`` float64."""
        return self.gradient.mark(None if self.features is None else self.features.mean(0).double())

    def at(self, place: float) -> LastLayer:
        """The last layer at a place of the course: 0 sent, 1 returned."""
        return self.sent.plus(self.moved, times=-self.site.recipe.lr * place)

    @cached_property
    def _start(self) -> tuple[Tensor, Tensor | None]:
        return self._answer(0.0)

    @property
    def features(self) -> Tensor | None:
        """What the last layer receives of the guesses at the model sent, ``(M, features)``; ``None`` if it is no dense layer."""
        return self._start[1]

    @property
    def answers(self) -> Tensor:
        """Probabilities of the guesses at the model sent, ``(M, classes)`` float64."""
        return self._start[0]

    @cached_property
    def answers_along(self) -> Tensor:
        """Probabilities of the guesses along the course, weighted as the steps are, ``(M, classes)`` float64."""
        return sum((weight * (self._answer(p)[0] if p else self.answers) for weight, p in self.course), start=torch.zeros(()))

    def marks(self, answers: Tensor, heights: Tensor | None = None) -> Tensor:
        """What an image of each class adds to the mark, ``(classes, classes)``: row y by the guesses of class y.

        A class of few guesses leans on all of them.

        Args:
            answers: ``(M, classes)`` probabilities of the guesses.
            heights: ``(M,)`` by which each guess counts: 1 in the bias, the sum of its features in row sums of the weight.
        """
        weight = torch.ones(len(answers), dtype=answers.dtype) if heights is None else heights
        rows = []
        for y in range(self.classes):
            near = _LEAN / len(answers) + (self.guessed == y).to(answers.dtype)
            wrong = answers - torch.eye(self.classes, dtype=answers.dtype)[y]
            rows.append(near * weight @ wrong / near.sum())
        return torch.stack(rows)

    def _answer(self, place: float) -> tuple[Tensor, Tensor | None]:
        pace = -self.site.recipe.lr * place
        moved = zip(self.site.start.items(), self.observed, strict=True)
        weights = {name: torch.add(value, step, alpha=pace) for (name, value), step in moved}
        name = names_of(self.site.start, classes=self.classes)[0]
        layer = None if name is None else dict(self.site.model.named_modules()).get(name.rpartition(".")[0])
        kept: list[Tensor] = []
        hook = layer.register_forward_pre_hook(lambda _, given: kept.append(given[0])) if isinstance(layer, nn.Linear) else None
        size = len(self.site.batches[0]) if self.site.recipe.train_mode else 64
        try:
            with torch.no_grad():
                logits = torch.cat(
                    [
                        functional_call(self.site.model, {**weights, **self.site.rest}, (some,))
                        for some in torch.split(self.guesses, size)
                    ]
                )
        finally:
            if hook is not None:
                hook.remove()
        flat = bool(kept) and all(one.dim() == 2 for one in kept)
        return logits.cpu().double().softmax(1), torch.cat(kept).cpu() if flat else None


def read(replay: Replay, observed: Sequence[Tensor], *, classes: int, guesses: Tensor, guessed: Tensor) -> Reading:
    """The reading of an update; where the site trains on batch statistics, guesses make whole batches of the same size.

    Arguments are those of :func:`flpriv.attacks.inversion.labels.recover`.

    Raises:
        FlprivError: if the last layer's update is not finite.
    """
    size = len(replay.batches[0])
    most = len(guesses) // size * size if replay.recipe.train_mode and len(guesses) >= size else len(guesses)
    known = guessed[:most].to("cpu")
    reading = Reading(site=replay, observed=observed, classes=classes, guesses=guesses[:most], guessed=known)
    parts = (reading.moved.weight, reading.moved.bias)
    if not all(bool(part.isfinite().all()) for part in parts if part is not None):
        raise FlprivError("the update of the last layer holds NaN or infinite values; lower the learning rate")
    return reading


def course(steps: int, *, momentum: float) -> tuple[tuple[float, float], ...]:
    """(weight, place) of ``steps`` local steps in at most five groups, see :attr:`Reading.course`."""
    pace = torch.tensor([(1 - momentum ** (step + 1)) / (1 - momentum) for step in range(steps)], dtype=torch.float64)
    weight = pace.flip(0) / pace.sum()
    place = (pace.cumsum(0) - pace) / pace.sum()
    groups = zip(weight.tensor_split(min(steps, _PLACES)), place.tensor_split(min(steps, _PLACES)), strict=True)
    return tuple((float(w.sum()), float(w @ p / w.sum())) for w, p in groups)
