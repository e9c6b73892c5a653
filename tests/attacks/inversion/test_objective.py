from __future__ import annotations

import pytest
import torch
from torch.nn.functional import cosine_similarity

from flpriv.attacks.inversion.objective import cosine, squared
from flpriv.attacks.inversion.regularisers import total_variation


def tensors(seed: int) -> list[torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, generator=rng), torch.randn(5, generator=rng), torch.randn((), generator=rng)]


def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([part.flatten() for part in parts])


def test_cosine_goes_over_all_tensors_together_and_ignores_scale() -> None:
    one, other = tensors(0), tensors(1)
    assert cosine(one, other).item() == pytest.approx(1 - cosine_similarity(flat(one), flat(other), dim=0).item(), abs=1e-6)
    assert cosine([100 * part for part in one], other).item() == pytest.approx(cosine(one, other).item(), abs=1e-6)
    assert cosine(one, one).item() == pytest.approx(0, abs=1e-6)
    assert cosine(one, [-part for part in one]).item() == pytest.approx(2, abs=1e-6)


def test_cosine_with_nothing_is_one_and_has_a_gradient() -> None:
    one = [part.requires_grad_() for part in tensors(0)]
    value = cosine(one, [torch.zeros_like(part) for part in one])
    assert value.item() == 1
    assert all(bool(torch.isfinite(slope).all()) for slope in torch.autograd.grad(value, one))


def test_squared_is_half_the_squared_distance() -> None:
    one, other = tensors(0), tensors(1)
    assert squared(one, other).item() == pytest.approx((flat(one) - flat(other)).square().sum().item() / 2, rel=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 3, 4, 5, 6)])
def test_total_variation_of_a_ramp_is_its_slope(shape: tuple[int, ...]) -> None:
    slopes = torch.tensor([0.1, 0.03, 0.07])[: len(shape) - 2]
    axes = [slope * torch.arange(size) for slope, size in zip(slopes, shape[2:], strict=True)]
    ramp = sum(torch.meshgrid(*axes, indexing="ij"), start=torch.zeros(shape[2:])).expand(shape)
    assert total_variation(ramp).item() == pytest.approx(slopes.sum().item(), rel=1e-5)


def test_total_variation_of_flat_and_single_pixel_images_is_zero() -> None:
    assert total_variation(torch.full((2, 1, 4, 4), 0.3)).item() == 0
    assert total_variation(torch.rand(2, 1, 1, 1)).item() == 0
