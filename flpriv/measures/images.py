"""Image similarity on [0, 1], 2D and 3D: mean squared error, PSNR, SSIM, correlation."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

CEILING = 100.0
"""PSNR of identical images, in dB; larger values are not told apart."""


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1] from the mean squared error: ``-10 log10(mse)``, at most ``CEILING`` dB."""
    return -10 * mse.double().clamp_min(10 ** (-CEILING / 10)).log10()


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error image by image: ``(N, C, *spatial)`` twice to ``(N,)`` float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def all_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of every image of ``a`` with every image of ``b``: ``(N, M)`` float64."""
    one, two = a.double().flatten(1), b.double().flatten(1)
    squares = one.square().sum(1)[:, None] + two.square().sum(1)[None] - 2 * one @ two.T
    return squares.clamp_min(0) / max(one.shape[1], 1)


def all_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation over pixels of every image of ``a`` with every image of ``b``: ``(N, M)``; 0 for a constant image."""

    def standard(images: Tensor) -> Tensor:
        flat = images.double().flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        length = centred.norm(dim=1, keepdim=True)
        return torch.where(length > 1e-6, centred / length, 0.0)

    one = standard(a)
    return torch.cat([one @ standard(part).T for part in torch.split(b, 256)], dim=1)


def ssim(a: Tensor, b: Tensor, *, sigma: float = 1.5, width: int = 11) -> Tensor:
    """Structural similarity image by image, data range 1.

    Gaussian window of ``width`` pixels along each axis, borders it does not fit in left out, channels averaged; population
    covariance as in the paper. An image thinner than the window along some axis gets the largest odd window that fits, of the
    same sigma.

    Args:
        a: ``(N, C, *spatial)`` in [0, 1], two or three spatial axes.
        b: the same shape.
        sigma: of the window, in pixels.
        width: of the window, odd.

    Returns:
        ``(N,)`` float64 in [-1, 1].

    Paper: Wang et al. 2004, "Image quality assessment: from error visibility to structural similarity".
    """
    smallest = min(a.shape[2:])
    window = _gaussian(sigma, min(width, smallest - 1 + smallest % 2))
    if not len(a):
        return torch.zeros(0, dtype=torch.float64)
    return torch.cat([_ssim(one, two, window) for one, two in zip(torch.split(a, 8), torch.split(b, 8), strict=True)])


def _ssim(a: Tensor, b: Tensor, window: Tensor) -> Tensor:
    a, b = a.double(), b.double()
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    var_a = _blur(a * a, window) - mean_a**2
    var_b = _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    score = (2 * mean_a * mean_b + c1) * (2 * covariance + c2) / ((mean_a**2 + mean_b**2 + c1) * (var_a + var_b + c2))
    return score.flatten(1).mean(1)


def _gaussian(sigma: float, width: int) -> Tensor:
    place = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    return weights / weights.sum()


def _blur(images: Tensor, window: Tensor) -> Tensor:
    """Filter along every spatial axis in turn, valid part only."""
    for axis in range(2, images.dim()):
        last = images.movedim(axis, -1)
        flat = last.reshape(-1, 1, last.shape[-1])
        images = functional.conv1d(flat, window[None, None]).reshape(*last.shape[:-1], -1).movedim(-1, axis)
    return images
