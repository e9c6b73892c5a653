"""What is known of images before any update is seen, as penalties on a trial."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Regulariser = Callable[[Tensor], Tensor]
"""Images ``(N, C, *spatial)`` to a scalar penalty."""


def total_variation(images: Tensor) -> Tensor:
    """Sum over the spatial axes of the mean absolute difference between neighbours, in [0, number of axes] on [0, 1].

    Images are ``(N, C, H, W)`` or ``(N, C, D, H, W)``; axes of a single pixel count nothing.
    """
    axes = [axis for axis in range(2, images.dim()) if images.shape[axis] > 1]
    return sum((images.diff(dim=axis).abs().mean() for axis in axes), start=images.new_zeros(()))


def squared_norm(images: Tensor) -> Tensor:
    """Mean squared pixel, in [0, 1] on [0, 1]."""
    return images.square().mean()


def near(prior: Tensor) -> Regulariser:
    """Mean squared distance of every image to one ``(C, *spatial)``, e.g. the mean public image; in [0, 1] on [0, 1]."""
    return lambda images: (images - prior.to(images)).square().mean()


def agreement(images: Tensor, labels: Tensor, *, restarts: int) -> Tensor:
    """What the restarts of each update agree on: their mean, images matched to those of the first restart.

    A batch comes back in no order: images of a label are matched by the smallest total squared distance, so that a mean is one
    of the same patient. In place of the registration of Yin et al. 2021 (https://arxiv.org/abs/2104.07586).

    Args:
        images: ``(P, N, C, *spatial)``, the restarts of one update together.
        labels: ``(P, N)``; restarts of one update may hold them in different orders.
        restarts: of each update, ≥ 1; divides P.

    Returns:
        ``(P, N, C, *spatial)``, for each image what its restarts agree on.
    """
    groups = images.view(-1, restarts, *images.shape[1:])
    count = images.shape[1]
    share = (
        _matched(groups.flatten(3), labels.view(-1, restarts, count)) if count > 1 else images.new_ones(*groups.shape[:2], 1, 1)
    )
    mean = torch.einsum("urij,uri...->uj...", share, groups) / restarts
    return torch.einsum("urij,uj...->uri...", share, mean).reshape(images.shape)


def _matched(images: Tensor, labels: Tensor) -> Tensor:
    """``(U, R, N, N)``, 1 where image i of a restart is matched to image j of the first restart of ``(U, R, N, pixels)``."""
    from scipy.optimize import linear_sum_assignment

    apart = torch.cdist(images, images[:, :1].expand_as(images)).square()
    apart = apart + images[0, 0].numel() * (labels[..., :, None] != labels[:, :1, None, :])
    places = [linear_sum_assignment(one)[1] for one in apart.flatten(0, 1).double().cpu().numpy()]
    columns = torch.stack([torch.from_numpy(place) for place in places]).to(images.device)
    return one_hot(columns, images.shape[2]).view(apart.shape).to(images.dtype)
