from __future__ import annotations

import torch
from torch import Tensor

from flpriv.attacks.malicious.readout import Layer, candidates

PIXELS = 1024
EDGES = torch.linspace(0.1, 0.9, 17)


def layer(batch: Tensor, weights: Tensor, *, lr: float = 0.5) -> Layer:
    """A layer after one step in which image n pulls with ``weights[n]`` on every neuron it fires."""
    weight = torch.full((len(EDGES), PIXELS), 1 / PIXELS)
    fired = (batch.mean(1) > EDGES[:, None]).float() * weights
    return Layer(weight=weight, bias=-EDGES, weight_after=weight - lr * fired @ batch, bias_after=-EDGES - lr * fired.sum(1))


def images(*means: float) -> Tensor:
    """One image of each mean intensity."""
    rng = torch.Generator().manual_seed(0)
    noise = torch.rand(len(means), PIXELS, generator=rng) - 0.5
    return torch.tensor(means)[:, None] + 0.15 * (noise - noise.mean(1, keepdim=True))


def test_lone_images_come_back_each_with_full_confidence() -> None:
    batch = images(0.3, 0.52, 0.88)
    found = candidates(layer(batch, torch.tensor([0.1, -0.2, 0.05])), most=None)
    assert torch.allclose(found.images[found.images.mean(1).argsort()], batch.clamp(0, 1), atol=1e-3)
    assert found.confidence.tolist() == [1, 1, 1]


def test_the_top_bin_is_kept_and_what_lies_below_the_first_is_lost() -> None:
    batch = images(0.05, 0.95)
    found = candidates(layer(batch, torch.tensor([0.1, 0.1])), most=None)
    assert len(found.images) == 1
    assert torch.allclose(found.images[0], batch[1].clamp(0, 1), atol=1e-3)


def test_empty_bins_give_nothing() -> None:
    still = layer(images(0.5), torch.zeros(1))
    assert candidates(still, most=None).images.shape == (0, PIXELS)


def test_a_mixture_with_both_signs_is_trusted_less_than_a_lone_image() -> None:
    found = candidates(layer(images(0.41, 0.44, 0.7), torch.tensor([0.2, -0.15, 0.1])), most=None)
    assert torch.allclose(found.images[0], images(0.41, 0.44, 0.7)[2], atol=1e-3)
    assert found.confidence[0] == 1 and (found.confidence[1:] < 0.9).all()


def test_no_more_than_were_there_and_the_surest_of_them() -> None:
    moved = layer(images(0.3, 0.5, 0.7), torch.tensor([0.1, 0.1, 0.1]))
    rng = torch.Generator().manual_seed(1)
    noise = 1e-3 * torch.randn(moved.weight_after.shape, generator=rng)
    noisy = Layer(
        weight=moved.weight, bias=moved.bias, weight_after=moved.weight_after + noise, bias_after=moved.bias_after + noise[:, 0]
    )
    assert len(candidates(noisy, most=None).images) > 3
    best = candidates(noisy, most=3)
    assert len(best.images) == 3
    assert best.confidence.tolist() == sorted(best.confidence.tolist(), reverse=True)
    assert best.confidence[0] == candidates(noisy, most=None).confidence[0]


def test_equal_images_are_merged() -> None:
    same = images(0.5)
    batch = torch.cat([same, same + 0.06])
    assert len(candidates(layer(batch, torch.tensor([0.1, 0.1])), most=None, alike=1e-4).images) == 2
    assert len(candidates(layer(batch, torch.tensor([0.1, 0.1])), most=None, alike=1e-2).images) == 1


def test_biases_lost_in_rounding_are_made_good_by_the_bin() -> None:
    """An update so small that the biases on both sides of the image do not move, while the smaller weights do."""
    batch = images(0.52)
    moved = layer(batch, torch.tensor([2e-8]))
    assert torch.equal(moved.bias[7:], moved.bias_after[7:])
    found = candidates(moved, most=None)
    assert (found.images - batch).square().mean(1).min() < 1e-3


def test_weight_decay_is_taken_out() -> None:
    batch = images(0.3, 0.7)
    plain = layer(batch, torch.tensor([0.1, -0.1]))
    shrunk = Layer(
        weight=plain.weight,
        bias=plain.bias,
        weight_after=plain.weight_after - 0.01 * plain.weight,
        bias_after=plain.bias_after - 0.01 * plain.bias,
        kept=0.99,
    )
    found = candidates(shrunk, most=2)
    assert torch.allclose(found.images[found.images.mean(1).argsort()], batch, atol=1e-3)
