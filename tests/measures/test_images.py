from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from flpriv.measures.images import all_correlations, all_mse, mse, psnr, ssim

SHAPES = [(1, 32, 32), (3, 24, 40), (1, 16, 20, 24), (2, 11, 11, 12)]


def pair(shape: tuple[int, ...], count: int = 3) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(0)
    original = torch.rand(count, *shape, generator=rng)
    noisy = (original + 0.1 * torch.randn(original.shape, generator=rng)).clamp(0, 1)
    return original, noisy


@pytest.mark.parametrize("shape", SHAPES)
def test_psnr_is_skimages(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    quality: Any = peak_signal_noise_ratio
    expected = [quality(x.double().numpy(), y.double().numpy(), data_range=1) for x, y in zip(a, b, strict=True)]
    assert psnr(mse(a, b)).tolist() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("shape", SHAPES)
def test_ssim_is_skimages(shape: tuple[int, ...]) -> None:
    a, b = pair(shape)
    similar: Any = structural_similarity
    expected = [
        similar(
            x.double().numpy(),
            y.double().numpy(),
            data_range=1,
            channel_axis=0,
            gaussian_weights=True,
            sigma=1.5,
            use_sample_covariance=False,
        )
        for x, y in zip(a, b, strict=True)
    ]
    assert ssim(a, b).tolist() == pytest.approx(expected, abs=1e-9)


def test_ssim_of_a_thin_volume_uses_the_largest_odd_window_that_fits() -> None:
    a, b = pair((1, 3, 3), count=1)
    weights = np.exp(-0.5 * (np.array([-1.0, 0.0, 1.0]) / 1.5) ** 2)
    window = np.outer(weights, weights) / weights.sum() ** 2
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    mean_x, mean_y = (window * x).sum(), (window * y).sum()
    var_x, var_y = (window * x * x).sum() - mean_x**2, (window * y * y).sum() - mean_y**2
    both = (window * x * y).sum() - mean_x * mean_y
    expected = (2 * mean_x * mean_y + 1e-4) * (2 * both + 9e-4) / ((mean_x**2 + mean_y**2 + 1e-4) * (var_x + var_y + 9e-4))
    assert float(ssim(a, b)) == pytest.approx(expected, abs=1e-12)
    thin = pair((1, 4, 30, 30))
    assert ssim(*thin).shape == (3,)
    assert ssim(thin[0], thin[0]).tolist() == pytest.approx([1.0] * 3)


def test_identical_images_are_at_the_ceiling_and_opposite_ones_at_zero() -> None:
    a = torch.rand(2, 1, 12, 12)
    assert psnr(mse(a, a)).tolist() == [100.0, 100.0]
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert float(psnr(mse(torch.zeros(1, 1, 12, 12), torch.ones(1, 1, 12, 12)))) == 0
    assert ssim(a[:0], a[:0]).shape == (0,)


def test_all_mse_is_mse_of_every_pair() -> None:
    a, b = pair((1, 9, 9), count=4)
    expected = torch.stack([mse(a, one.expand_as(a)) for one in b], 1)
    assert torch.allclose(all_mse(a, b), expected, atol=1e-14)
    assert all_mse(a[:0], b).shape == (0, 4)


def test_all_correlations_is_numpys_and_nothing_for_a_flat_image() -> None:
    a, b = pair((1, 9, 9), count=3)
    expected = np.corrcoef(a.flatten(1).double().numpy(), b.flatten(1).double().numpy())[:3, 3:]
    assert np.allclose(all_correlations(a, b).numpy(), expected, atol=1e-12)
    assert all_correlations(torch.full((1, 1, 9, 9), 0.3), b).tolist() == [[0.0] * 3]
    assert math.isclose(float(all_correlations(a[:1], a[:1] * 0.5 + 0.2)), 1.0, abs_tol=1e-9)
