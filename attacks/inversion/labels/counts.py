"""Counts: how often each class occurs, from what an image of each class adds to the gradient of the last layer."""

from __future__ import annotations

import torch
from torch import Tensor


def shares(mark: Tensor, marks: Tensor) -> Tensor:
    """The mixture of ``marks`` that comes nearest to ``mark``: ``(classes,)`` float64, ≥ 0, summing to 1.

    Each image adds ``p - onehot(y)`` to the gradient of the last bias; ``marks`` say what an image of each class adds on average.

    Paper: after Wainakh et al. 2022, https://arxiv.org/abs/2105.09369, and Chen and Vikalo 2024, https://arxiv.org/abs/2405.00955,
    who solve for counts by least squares too.

    Args:
        mark: ``(classes,)`` of the update.
        marks: ``(classes, classes)``, row y the mark of images of class y.
    """
    from scipy.optimize import nnls

    heavy = 1e3 * float(marks.abs().max().clamp_min(1e-12))
    rows = torch.cat([marks.T.double(), torch.full((1, len(marks)), heavy, dtype=torch.float64)])
    share, _ = nnls(rows.numpy(), torch.cat([mark.double(), torch.tensor([heavy], dtype=torch.float64)]).numpy())
    found: Tensor = torch.from_numpy(share) / max(float(share.sum()), 1e-12)
    return found


def whole(share: Tensor, *, images: int) -> Tensor:
    """``images`` dealt out by ``share`` ``(classes,)``, remainders to the largest: ``(classes,)`` int64 summing to ``images``."""
    exact = share.double() / share.double().sum() * images
    counts = (exact + 1e-9).floor().long()
    first = (counts - exact).argsort(stable=True)[: images - int(counts.sum())]
    counts[first] += 1
    return counts


def count(mark: Tensor, marks: Tensor, *, images: int) -> Tensor:
    """How often each class occurs among ``images``: :func:`shares` in whole numbers, ``(classes,)`` int64."""
    return whole(shares(mark, marks), images=images)


def balanced(share: Tensor, prior: Tensor, *, images: int, all_records: bool) -> Tensor:
    """Counts from the shares of a balanced loss, where class c weighs ``N / (K n_c)`` among the N records of a site's K classes.

    The update shows images times weight alone. Over all records of a site that product is ``N / K`` for each of its classes,
    whatever the counts: which classes occur is certain, how often is left to ``prior``. In a batch the product is so on average;
    a larger share speaks for more images than the site's frequencies bring, and these have to be supposed.

    Args:
        share: ``(classes,)`` of the weighted loss, see :func:`shares`.
        prior: ``(classes,)`` supposed class frequencies, > 0, of any sum.
        images: how many, ≥ 1.
        all_records: whether the update used every record of the site equally.

    Returns:
        ``(classes,)`` int64 summing to ``images``.
    """
    if not all_records:
        return whole(share * prior, images=images)
    found = share > min(1 / (2 * len(share)), float(share.max()) / 2)
    counts = whole(found * prior, images=images)
    for missing in (found & (counts == 0)).nonzero().flatten().tolist():
        most = int(counts.argmax())
        if counts[most] > 1:
            counts[missing], counts[most] = 1, counts[most] - 1
    return counts
