from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap
from torch.nn.functional import cosine_similarity

from flpriv.attacks.inversion.objective import DISTANCES, Objective, absolute, cosine, each, mix, relative, squared, weighted
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


@pytest.mark.parametrize("order", [1, 2])
def test_l1_and_l2_are_shares_of_the_observed_update(order: int) -> None:
    one, other = tensors(0), tensors(1)
    compare = absolute if order == 1 else relative
    apart, size = ((flat(one) - flat(other)).norm(order) ** order, flat(other).norm(order) ** order)
    assert compare(one, other).item() == pytest.approx((apart / size).item(), rel=1e-5)
    assert compare([7 * part for part in one], [7 * part for part in other]).item() == pytest.approx(
        compare(one, other).item(), rel=1e-5
    )


@pytest.mark.parametrize("name", sorted(DISTANCES))
def test_a_trial_without_any_update_is_about_one_away(name: str) -> None:
    compare = next(value for key, value in DISTANCES.items() if key == name)
    observed = tensors(1)
    assert compare([torch.zeros_like(part) for part in observed], observed).item() == pytest.approx(1, rel=1e-6)
    assert compare(observed, observed).item() == pytest.approx(0, abs=1e-6)


def test_a_mix_is_the_weighted_sum() -> None:
    one, other = tensors(0), tensors(1)
    expected = 0.3 * cosine(one, other) + 2 * absolute(one, other)
    assert mix((0.3, cosine), (2, absolute))(one, other).item() == pytest.approx(expected.item(), rel=1e-6)


def test_weights_of_layers() -> None:
    one, other = tensors(0), tensors(1)
    last = weighted(squared, lambda place, count: float(place == count - 1))
    assert last(one, other).item() == pytest.approx(squared(one[-1:], other[-1:]).item(), rel=1e-6)
    growing = weighted(absolute, lambda place, count: (place + 1) / count)
    by_hand = absolute([one[0] / 3, one[1] * 2 / 3, one[2]], [other[0] / 3, other[1] * 2 / 3, other[2]])
    assert growing(one, other).item() == pytest.approx(by_hand.item(), rel=1e-6)


def test_each_layer_by_itself_counts_small_ones_as_much_as_large_ones() -> None:
    one, other = tensors(0), tensors(1)
    small = [part * scale for part, scale in zip(one, (1.0, 1e-4, 1e3), strict=True)]
    assert each(cosine)(small, other).item() == pytest.approx(each(cosine)(one, other).item(), abs=1e-6)
    assert each(relative)(one, other).item() == pytest.approx(
        sum(relative([a], [b]).item() for a, b in zip(one, other, strict=True)) / 3, rel=1e-6
    )


@pytest.mark.parametrize(
    "compare",
    [cosine, squared, relative, absolute, mix((1, cosine), (1, absolute)), each(cosine), weighted(relative, lambda p, n: p + 1)],
)
def test_objectives_work_on_many_trials_at_once(compare: Objective) -> None:
    trials, observed = [torch.stack(parts) for parts in zip(tensors(0), tensors(2), strict=True)], tensors(1)
    values = vmap(lambda *trial: compare(trial, observed))(*trials)
    slopes = vmap(lambda *trial: grad(lambda parts: compare(parts, observed))(list(trial)))(*trials)
    for place in range(2):
        alone = [part[place] for part in trials]
        assert values[place].item() == pytest.approx(compare(alone, observed).item(), rel=1e-5)
        for together, single in zip(slopes, grad(lambda parts: compare(parts, observed))(alone), strict=True):
            assert torch.allclose(together[place], single, atol=1e-6)


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 3, 4, 5, 6)])
def test_total_variation_of_a_ramp_is_its_slope(shape: tuple[int, ...]) -> None:
    slopes = torch.tensor([0.1, 0.03, 0.07])[: len(shape) - 2]
    axes = [slope * torch.arange(size) for slope, size in zip(slopes, shape[2:], strict=True)]
    ramp = sum(torch.meshgrid(*axes, indexing="ij"), start=torch.zeros(shape[2:])).expand(shape)
    assert total_variation(ramp).item() == pytest.approx(slopes.sum().item(), rel=1e-5)


def test_total_variation_of_flat_and_single_pixel_images_is_zero() -> None:
    assert total_variation(torch.full((2, 1, 4, 4), 0.3)).item() == 0
    assert total_variation(torch.rand(2, 1, 1, 1)).item() == 0
