"""Image similarity on [0, 1], 2D and 3D: mean squared error, PSNR, SSIM, MS-SSIM, RDLV, correlation."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

CEILING = 100.0
"""PSNR of identical images, in dB; larger values are not told apart."""
SIGMA, WIDTH = 1.5, 11
"""Gaussian window of SSIM, in pixels."""
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)
"""Exponents of MS-SSIM from the finest scale to the coarsest, as the paper measured them."""
LEAST_PRIOR = 0.05
"""RDLV is not told of an original whose SSIM with the prior is below this: the quotient would be noise."""
_BLOCK = 2**24
"""Numbers of each side held at a time where all images meet all: 128 MB of float64."""


def psnr(mse: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of images in [0, 1] from the mean squared error: ``-10 log10(mse)``, at most ``CEILING`` dB."""
    return -10 * mse.double().clamp_min(10 ** (-CEILING / 10)).log10()


def mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error image by image: ``(N, C, *spatial)`` twice to ``(N,)`` float64."""
    return (a.double() - b.double()).square().flatten(1).mean(1)


def all_mse(a: Tensor, b: Tensor) -> Tensor:
    """Mean squared error of every image of ``a`` with every image of ``b``: ``(N, M)`` float64."""

    def between(one: Tensor, two: Tensor) -> Tensor:
        one, two = one.double().flatten(1), two.double().flatten(1)
        return one.square().sum(1)[:, None] + two.square().sum(1)[None] - 2 * one @ two.T

    return _pairwise(between, a, b).clamp_min(0) / max(1, a[:1].numel())


def all_correlations(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation over pixels of every image of ``a`` with every image of ``b``: ``(N, M)``; 0 for a constant image."""

    def standard(images: Tensor) -> Tensor:
        flat = images.double().flatten(1)
        centred = flat - flat.mean(1, keepdim=True)
        length = centred.norm(dim=1, keepdim=True)
        return torch.where(length > 1e-6, centred / length, 0.0)

    return _pairwise(lambda one, two: standard(one) @ standard(two).T, a, b)


def ssim(a: Tensor, b: Tensor, *, sigma: float = SIGMA, width: int = WIDTH) -> Tensor:
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
    return torch.cat([_structure(one, two, window)[0] for one, two in zip(_parts(a), _parts(b), strict=True)])


def scales(shape: Sequence[int]) -> int:
    """How many scales of MS-SSIM images of this ``(*spatial)`` shape hold, at most 5: so often halved, the window still fits."""
    fits = [scale for scale in range(len(WEIGHTS)) if min(shape) >> scale >= WIDTH]
    return len(fits)


def ms_ssim(a: Tensor, b: Tensor) -> Tensor:
    """Multi-scale structural similarity image by image, data range 1.

    ``cs_1^w_1 · … · cs_(M-1)^w_(M-1) · SSIM_M^w_M``: contrast and structure at the finer scales, SSIM with its luminance at
    the coarsest, each the mean over the image and its channels, and 0 where that mean is negative. A scale is the one before
    averaged over 2 pixels along every axis. The paper's five weights take 176 pixels along the shortest axis; smaller images
    get the first M weights, divided by their sum, of the M scales they hold. Values of different M do not compare.

    Args:
        a: ``(N, C, *spatial)`` in [0, 1], two or three spatial axes.
        b: the same shape.

    Returns:
        ``(N,)`` float64 in [0, 1]; NaN where less than two scales fit (below 22 pixels), for one scale is SSIM.

    Paper: Wang, Simoncelli and Bovik 2003, "Multiscale structural similarity for image quality assessment".
    """
    count = scales(a.shape[2:])
    if count < 2 or not len(a):
        return torch.full((len(a),), torch.nan, dtype=torch.float64)
    return torch.cat([_ms_ssim(one, two, count) for one, two in zip(_parts(a), _parts(b), strict=True)])


def rdlv(recovered: Tensor, prior: Tensor) -> Tensor:
    """Relative data leakage value: by how much a reconstruction is more alike the original than what was known before.

    ``(SSIM(x, reconstruction) - SSIM(x, prior)) / SSIM(x, prior)``; 0 is nothing gained, -1 nothing alike. With a prior
    that is hardly alike the original the quotient is no measure, and it turns its sign with the prior's: NaN below
    ``LEAST_PRIOR``.

    Args:
        recovered: ``(N,)`` SSIM of the reconstructions.
        prior: ``(N,)`` SSIM of the prior, the same image for all originals.

    Paper: Hatamizadeh et al. 2023, "Do gradient inversion attacks make federated learning unsafe?".
    """
    return torch.where(prior >= LEAST_PRIOR, (recovered - prior) / prior, torch.nan)


def _pairwise(between: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    return torch.cat([torch.cat([between(one, two) for two in _parts(b, _BLOCK)], 1) for one in _parts(a, _BLOCK)])


def _parts(images: Tensor, numbers: int = 2**19) -> tuple[Tensor, ...]:
    """The images in parts of about so many numbers: bounded memory, and small enough for the processor's cache."""
    return torch.split(images, max(1, numbers // max(1, images[:1].numel())))


def _ms_ssim(a: Tensor, b: Tensor, count: int) -> Tensor:
    weights = torch.tensor(WEIGHTS[:count], dtype=torch.float64) / sum(WEIGHTS[:count])
    window = _gaussian(SIGMA, WIDTH)
    halve = functional.avg_pool2d if a.dim() == 4 else functional.avg_pool3d
    a, b = a.double(), b.double()
    score = torch.ones(len(a), dtype=torch.float64)
    for scale, weight in enumerate(weights.tolist(), 1):
        whole, contrast = _structure(a, b, window)
        score = score * (whole if scale == count else contrast).clamp_min(0) ** weight
        if scale < count:
            a, b = halve(a, 2), halve(b, 2)
    return score


def _structure(a: Tensor, b: Tensor, window: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over each image of SSIM, and of its contrast and structure terms without luminance."""
    a, b = a.double(), b.double()
    c1, c2 = 0.01**2, 0.03**2
    mean_a, mean_b = _blur(a, window), _blur(b, window)
    var_a = _blur(a * a, window) - mean_a**2
    var_b = _blur(b * b, window) - mean_b**2
    covariance = _blur(a * b, window) - mean_a * mean_b
    contrast = (2 * covariance + c2) / (var_a + var_b + c2)
    luminance = (2 * mean_a * mean_b + c1) / (mean_a**2 + mean_b**2 + c1)
    return (luminance * contrast).flatten(1).mean(1), contrast.flatten(1).mean(1)


def _gaussian(sigma: float, width: int) -> Tensor:
    place = torch.arange(width, dtype=torch.float64) - (width - 1) / 2
    weights = torch.exp(-0.5 * (place / sigma) ** 2)
    return weights / weights.sum()


def _blur(images: Tensor, window: Tensor) -> Tensor:
    """Filter along every spatial axis in turn, valid part only: a product with a banded matrix, many times faster than conv1d."""
    for axis in range(2, images.dim()):
        images = (images.movedim(axis, -1) @ _band(images.shape[axis], window)).movedim(-1, axis)
    return images


def _band(size: int, window: Tensor) -> Tensor:
    """``(size, size - width + 1)``: the window, one place further down in each column."""
    return torch.stack([functional.pad(window, (at, size - len(window) - at)) for at in range(size - len(window) + 1)], dim=1)
