"""What is known of images before any update is seen, as penalties on a trial."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Regulariser = Callable[[Tensor], Tensor]
"""Images ``(N, C, *spatial)`` to a scalar penalty."""


def total_variation(images: Tensor) -> Tensor:
    """Sum over the spatial axes of the mean absolute difference between neighbours, in [0, number of axes] on [0, 1].

    Images are ``(N, C, H, W)`` or ``(N, C, D, H, W)``; axes of a single pixel count nothing.
    """
    axes = [axis for axis in range(2, images.dim()) if images.shape[axis] > 1]
    return sum((images.diff(dim=axis).abs().mean() for axis in axes), start=images.new_zeros(()))
