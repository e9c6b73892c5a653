"""Rules of the literature that read labels off the gradient of the last layer.

``mark`` ``(classes,)`` is the gradient of the last bias, or the row sums of that of the last weight: the mean over the images of
``p - onehot(y)``, up to a positive factor. Every rule but :func:`idlg` gives how often each class occurs, ``(classes,)`` int64
summing to ``images``.
"""

from __future__ import annotations

import torch
from torch import Tensor


def idlg(mark: Tensor) -> int:
    """The label of a single image: the only class whose ``mark`` is negative.

    Paper: Zhao et al. 2020, https://arxiv.org/abs/2001.02610.
    """
    return int(mark.argmin())


def negative(mark: Tensor, *, images: int) -> Tensor:
    """One image of each class with a negative ``mark``, the most negative first; that one takes what is left over.

    A class without images has a positive mark; one with few images may have too. Paper: as :func:`idlg`, for a batch.
    """
    order = mark.argsort(stable=True)
    found = order[: min(images, max(1, int((mark < 0).sum())))]
    counts = torch.bincount(found, minlength=len(mark))
    counts[order[0]] += images - len(found)
    return counts


def minima(rows: Tensor, *, images: int) -> Tensor:
    """One image of each class whose row of the last weight's gradient, ``(classes, features)``, has the smallest minimum.

    Made for distinct labels and features ≥ 0; beyond one image a class it starts again in the same order.

    Paper: Yin et al. 2021, See Through Gradients, https://arxiv.org/abs/2104.07586.
    """
    order = rows.amin(1).argsort(stable=True)
    return torch.bincount(order[torch.arange(images) % len(order)], minlength=len(order))


def bias_corrected(mark: Tensor, *, images: int) -> Tensor:
    """One image of each class with a negative ``mark``; then again and again of the class with the smallest one left.

    Each image found takes its share, the sum of negative marks over ``images``, off the mark of its class.

    Paper: Geiping et al. 2020, https://arxiv.org/abs/2003.14053, as extended to repeated labels by Fowl et al. 2022.
    """
    return _take(mark, mark.clamp_max(0).sum() / images, torch.zeros_like(mark), images=images)


def llg(mark: Tensor, *, images: int) -> Tensor:
    """As :func:`bias_corrected`, each image's impact being larger by ``1 + 1 / classes``; on row sums of the weight.

    Paper: Wainakh et al. 2022 (LLG), https://arxiv.org/abs/2105.09369.
    """
    return _take(mark, mark.clamp_max(0).sum() / images * (1 + 1 / len(mark)), torch.zeros_like(mark), images=images)


def llg_star(mark: Tensor, marks: Tensor, *, images: int) -> Tensor:
    """LLG with impact and offsets from images of one's own.

    Args:
        mark: of the update.
        marks: ``(classes, classes)``, row y the mean mark of images of class y.
        images: how many, ≥ 1.

    Paper: Wainakh et al. 2022 (LLG* with noise, LLG+ with public images), https://arxiv.org/abs/2105.09369.
    """
    classes = len(mark)
    own = marks.diagonal()
    return _take(mark, own.mean() / images * (1 + 1 / classes), (marks.sum(0) - own) / (classes - 1), images=images)


def _take(mark: Tensor, impact: Tensor, offset: Tensor, *, images: int) -> Tensor:
    counts = torch.zeros(len(mark), dtype=torch.long)
    first = mark.argsort(stable=True)[: int((mark < 0).sum())][:images]
    counts[first] = 1
    left = mark - counts * impact - offset
    for _ in range(images - len(first)):
        least = int(left.argmin())
        counts[least] += 1
        left[least] -= impact
    return counts
