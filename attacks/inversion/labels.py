"""Which labels lie behind an update, read from the last layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from flpriv.attacks.inversion.unroll import Replay
from flpriv.errors import FlprivError


def idlg(mark: Tensor) -> int:
    """The label of a single image: the only class whose ``mark`` is negative.

    Paper: Zhao et al. 2020, https://arxiv.org/abs/2001.02610.
    """
    return int(mark.argmin())


def count(mark: Tensor, marks: Tensor, *, images: int) -> Tensor:
    """How often each class occurs among ``images``: the whole numbers whose mean of ``marks`` comes nearest to ``mark``.

    Each image adds ``p - onehot(y)`` to the gradient of the last bias; ``marks`` say what an image of each class adds on average.

    Paper: after Wainakh et al. 2022 (LLG), https://arxiv.org/abs/2105.09369.

    Args:
        mark: ``(classes,)`` of the update, see :func:`marks_of`.
        marks: ``(classes, classes)``, row y the mark of images of class y.
        images: how many, ≥ 1.

    Returns:
        ``(classes,)`` int64 summing to ``images``.
    """
    from scipy.optimize import nnls

    heavy = 1e3 * float(marks.abs().max().clamp_min(1e-12))
    rows = torch.cat([marks.T.double(), torch.full((1, len(marks)), heavy, dtype=torch.float64)])
    share, _ = nnls(rows.numpy(), torch.cat([mark.double(), torch.tensor([heavy], dtype=torch.float64)]).numpy())
    exact = torch.from_numpy(share) / max(share.sum(), 1e-12) * images
    whole: Tensor = exact.floor().long()
    first = (whole - exact).argsort(stable=True)[: images - int(whole.sum())]
    whole[first] += 1
    return whole


def marks_of(update: Mapping[str, Tensor], *, classes: int) -> Tensor:
    """One number per class, ``(classes,)``: the entries of the last layer's bias, or the row sums of its weight without one.

    ``update`` lists parameters in the model's order.

    Raises:
        FlprivError: if no layer ends in ``classes`` rows.
    """
    rows = [value for value in update.values() if value.dim() in (1, 2) and len(value) == classes]
    if not rows:
        raise FlprivError(f"the model has no last layer of {classes} rows to read labels from; grant 'know-labels'")
    last = rows[-1].detach().cpu()
    return last if last.dim() == 1 else last.sum(1)


def recover(replay: Replay, observed: Sequence[Tensor], *, classes: int, guesses: Tensor, guessed: Tensor) -> Tensor:
    """The labels behind an update, ``(images,)`` int64, sorted.

    One image's label is certain. Counts in a batch are estimates, best while the model is untrained and moves little in the
    round; momentum makes them lean towards the labels of early steps, a balanced loss towards rare classes.

    Args:
        replay: of the site's round.
        observed: ``(W₀ - W_τ) / lr`` in the order of ``replay.start``.
        classes: of the task.
        guesses: images like those looked for, ``(M, C, *spatial)``: public ones, or noise for want of them.
        guessed: their labels ``(M,)``; a class without a guess borrows all of them.
    """
    steps = len(replay.batches)
    momentum = replay.recipe.momentum
    weight = sum((1 - momentum ** (step + 1)) / (1 - momentum) for step in range(steps))
    mark = marks_of(dict(zip(replay.start, observed, strict=True)), classes=classes) / weight
    if replay.images == 1:
        decay = replay.recipe.weight_decay * marks_of(replay.start, classes=classes)
        return torch.tensor([idlg(mark - decay)])
    rows = []
    for label in range(classes):
        like = guesses[guessed == label] if bool((guessed == label).any()) else guesses
        alone = replay.of(len(like))(like, like.new_full((len(like),), label, dtype=torch.long))
        rows.append(marks_of(dict(zip(replay.start, alone, strict=True)), classes=classes))
    return torch.arange(classes).repeat_interleave(count(mark, torch.stack(rows), images=replay.images))
