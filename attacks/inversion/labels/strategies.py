"""Strategies: from one update to how often each class occurs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from flpriv.attacks.inversion.labels.counts import balanced, shares, whole
from flpriv.attacks.inversion.labels.last_layer import LastLayer
from flpriv.attacks.inversion.labels.reading import Reading
from flpriv.attacks.inversion.labels.rules import bias_corrected, idlg, llg, llg_star, minima, negative
from flpriv.attacks.inversion.labels.unusual import least_unusual, puzzle
from flpriv.errors import FlprivError

Strategy = Literal[
    "auto", "idlg", "negative", "minima", "bias-corrected", "llg", "llg-star", "count", "count-along", "own-feature", "unusual"
]
"""How labels are read.

- ``"idlg"``: the smallest mark, for one image.
- ``"negative"``, ``"minima"``, ``"bias-corrected"``, ``"llg"``: rules on the gradient alone.
- ``"llg-star"``, ``"count"``: with the probabilities that images of one's own get from the model sent.
- ``"count-along"``: with their mean over the models between the one sent and the one returned.
- ``"own-feature"``: with the probabilities of the mean feature that the gradient itself shows; needs no images.
- ``"unusual"``: such counts, then exchanged one by one for those which need the least unusual features; for one step.
- ``"auto"``: the best measured for what is at hand.
"""


_MOST = 16
"""Images in a puzzle: its cost grows with their cube."""


def _auto(reading: Reading) -> Tensor:
    """One image shows its label; else mean answers count, and features where they were measured to tell more.

    They do so for one step whose counts are in doubt. Little doubt is enough where images are no more than classes, for the
    gradient then holds an equation for each feature; where there is hardly any, counts stay if features explain them at all.
    """
    if reading.images == 1 and float(reading.mark.min()) < -1e-5:
        return _one(reading)
    doubt, few = float(_doubt(reading).max()), reading.images <= reading.classes
    fit = _one_step(reading) and _whole_layer(reading) and 1 < reading.images <= _MOST
    if not fit or reading.mark is not reading.gradient.bias or doubt <= (0.05 if few else 0.55):
        return _mean(reading)
    return _unusual(reading, content=0.0 if doubt > 0.25 else 5.0)


def _mean(reading: Reading) -> Tensor:
    """Noise answers like noise: without real images the gradient itself knows better what the images' features are."""
    return _along(reading) if reading.labelled or not _whole_layer(reading) else _own(reading)


def _one(reading: Reading) -> Tensor:
    counts = torch.zeros(reading.classes, dtype=torch.long)
    counts[idlg(reading.mark)] = reading.images
    return counts


def _counted(reading: Reading, marks: Tensor) -> Tensor:
    """Counts from what an image of each class adds to the mark, the weights of a balanced loss taken out."""
    share = shares(reading.mark, marks)
    recipe, images = reading.site.recipe, reading.images
    if recipe.loss == "cross-entropy":
        return whole(share, images=images)
    prior = 1 + torch.bincount(reading.guessed[reading.guessed >= 0], minlength=reading.classes)
    everything = recipe.steps is None or images < recipe.steps * recipe.batch_size
    return balanced(share, prior, images=images, all_records=everything)


def _along(reading: Reading) -> Tensor:
    return _counted(reading, reading.marks(reading.answers_along))


def _own(reading: Reading) -> Tensor:
    """The mean feature is read off the gradient, with a little trust in the guesses' own."""
    weight, _, features = _dense(reading, reading.gradient, "own-feature")
    trust = 0.03 * (1 - 1 / reading.classes) / reading.images
    mean = (trust * features.mean(0).double() + reading.mark @ weight) / (trust + float(reading.mark @ reading.mark))
    answers = torch.zeros(reading.classes, dtype=torch.float64)
    for share, place in reading.course:
        rows, shift, _ = _dense(reading, reading.at(place), "own-feature")
        answers += share * (rows @ mean + shift).softmax(0)
    return _counted(reading, answers - torch.eye(reading.classes, dtype=answers.dtype))


def _unusual(reading: Reading, *, content: float = 0.0) -> Tensor:
    """Labels of the least unusual features; the mean's counts stay where their cost per number sought is at most ``content``."""
    weight, bias, features = _dense(reading, reading.gradient, "unusual")
    if not _one_step(reading) or reading.images > _MOST:
        raise FlprivError(f"labels.unusual: reads one local step of at most {_MOST} images without class weights; choose another")
    start, among = _mean(reading), _doubt(reading) > 0.05
    if not bool(among.any()):
        return start
    riddle = puzzle(LastLayer(weight=weight, bias=bias), reading.sent, features, images=reading.images)
    enough = content * reading.images * riddle.slopes.shape[1]
    return start if content and riddle.cost(start) <= enough else least_unusual(riddle, start=start, among=among)


def _minima(reading: Reading) -> Tensor:
    if reading.gradient.weight is None:
        raise FlprivError("labels.minima: the last layer is no dense layer; choose another strategy")
    return minima(reading.gradient.weight, images=reading.images)


def _llg(reading: Reading) -> Tensor:
    return llg(_row_sums(reading), images=reading.images)


def _llg_star(reading: Reading) -> Tensor:
    heights = None if reading.gradient.weight is None or reading.features is None else reading.features.sum(1).double()
    return llg_star(_row_sums(reading), reading.marks(reading.answers, heights), images=reading.images)


def _row_sums(reading: Reading) -> Tensor:
    weight = reading.gradient.weight
    sums: Tensor = reading.mark if weight is None or reading.features is None else weight.sum(1)
    return sums


def _doubt(reading: Reading) -> Tensor:
    """Standard error of counts, ``(classes,)`` images, by the spread of the guesses' probabilities; noise spreads too little."""
    wider = 1.0 if reading.labelled else 4.0
    return reading.answers.std(0, correction=0).mul(wider * reading.images**0.5)


def _one_step(reading: Reading) -> bool:
    return reading.site.recipe.loss == "cross-entropy" and len(reading.site.batches) == 1


def _whole_layer(reading: Reading) -> bool:
    return all(part is not None for part in (reading.features, reading.sent.weight, reading.sent.bias))


def _dense(reading: Reading, layer: LastLayer, strategy: Strategy) -> tuple[Tensor, Tensor, Tensor]:
    """Weight and bias of ``layer``, and the features of the guesses, ``(M, features)``."""
    if layer.weight is None or layer.bias is None or reading.features is None:
        raise FlprivError(f"labels.{strategy}: needs a dense last layer with a bias; choose another strategy")
    return layer.weight, layer.bias, reading.features


STRATEGIES: Mapping[Strategy, Callable[[Reading], Tensor]] = {
    "auto": _auto,
    "idlg": _one,
    "negative": lambda reading: negative(reading.mark, images=reading.images),
    "minima": _minima,
    "bias-corrected": lambda reading: bias_corrected(reading.mark, images=reading.images),
    "llg": _llg,
    "llg-star": _llg_star,
    "count": lambda reading: _counted(reading, reading.marks(reading.answers)),
    "count-along": _along,
    "own-feature": _own,
    "unusual": _unusual,
}
"""From a reading to ``(classes,)`` int64 summing to its images."""
