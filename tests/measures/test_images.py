from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from monai.metrics.regression import compute_ms_ssim
from scipy.ndimage import correlate1d
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from flpriv.measures import images
from flpriv.measures.images import WEIGHTS, all_correlations, all_mse, ms_ssim, mse, psnr, rdlv, scales, ssim

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


def test_images_meet_in_parts_as_they_do_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    a, b = pair((1, 9, 9), count=7)
    whole = all_mse(a, b), all_correlations(a, b)
    monkeypatch.setattr(images, "_BLOCK", 200)
    assert torch.allclose(all_mse(a, b), whole[0], atol=1e-14)
    assert torch.allclose(all_correlations(a, b), whole[1], atol=1e-14)
    assert all_correlations(a[:0], b).shape == (0, 7)


@pytest.mark.parametrize(
    ("shape", "held"),
    [
        ((1, 176, 176), 5),
        ((3, 181, 203), 5),
        ((1, 128, 100), 4),
        ((1, 64, 64), 3),
        ((2, 23, 40), 2),
        ((1, 46, 44, 50), 3),
        ((1, 32, 24, 33), 2),
    ],
)
def test_ms_ssim_is_monais(shape: tuple[int, ...], held: int) -> None:
    a, b = pair(shape, count=2)
    assert scales(shape[1:]) == held
    weights = [weight / sum(WEIGHTS[:held]) for weight in WEIGHTS[:held]]
    expected = compute_ms_ssim(b, a, spatial_dims=len(shape) - 1, weights=weights)
    assert ms_ssim(a, b).tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-4)  # MONAI's is float32


def test_ms_ssim_is_the_papers_formula_to_the_last_digits() -> None:
    a, b = pair((1, 46, 51), count=1)
    x, y = a[0, 0].double().numpy(), b[0, 0].double().numpy()
    window = np.exp(-0.5 * (np.arange(-5, 6) / 1.5) ** 2)

    def blur(image: Any) -> Any:
        return correlate1d(correlate1d(image, window / window.sum(), 0), window / window.sum(), 1)[5:-5, 5:-5]

    expected = 1.0
    for weight, last in ((0.0448, False), (0.2856, False), (0.3001, True)):
        mean_x, mean_y = blur(x), blur(y)
        spread = blur(x * x) - mean_x**2 + blur(y * y) - mean_y**2
        term = (2 * (blur(x * y) - mean_x * mean_y) + 0.03**2) / (spread + 0.03**2)
        if last:
            term = term * (2 * mean_x * mean_y + 0.01**2) / (mean_x**2 + mean_y**2 + 0.01**2)
        expected *= term.mean() ** (weight / (0.0448 + 0.2856 + 0.3001))
        x, y = (z[: z.shape[0] // 2 * 2, : z.shape[1] // 2 * 2] for z in (x, y))
        x, y = ((z[::2, ::2] + z[1::2, ::2] + z[::2, 1::2] + z[1::2, 1::2]) / 4 for z in (x, y))
    assert float(ms_ssim(a, b)) == pytest.approx(expected, abs=1e-12)


def test_ms_ssim_of_small_images_is_not_a_number_and_of_opposite_ones_nothing() -> None:
    assert [scales((side, 300)) for side in (10, 11, 21, 22, 43, 44, 175, 176, 4000)] == [0, 1, 1, 2, 2, 3, 4, 5, 5]
    small = torch.rand(2, 1, 21, 30)
    assert ms_ssim(small, small).isnan().all()
    a = torch.rand(2, 1, 30, 30, generator=torch.Generator().manual_seed(0))
    assert ms_ssim(a, a).tolist() == pytest.approx([1.0, 1.0])
    assert ms_ssim(a, 1 - a).tolist() == [0.0, 0.0]
    assert ms_ssim(a[:0], a[:0]).shape == (0,)


def test_rdlv_is_the_gain_over_the_prior_relative_to_it_and_nothing_where_the_prior_is_nothing() -> None:
    recovered = torch.tensor([0.9, 0.5, 0.25, 0.0, 0.9, 0.9, 0.9], dtype=torch.float64)
    prior = torch.tensor([0.5, 0.5, 0.5, 0.5, 0.04, 0.0, -0.3], dtype=torch.float64)
    assert rdlv(recovered, prior)[:4].tolist() == pytest.approx([0.8, 0.0, -0.5, -1.0])
    assert rdlv(recovered, prior)[4:].isnan().all()
