from __future__ import annotations

import torch
from torch import Tensor

from flpriv.attacks.malicious.crossed_readout import CrossedLayer, mixed_directions, principal_directions

PIXELS, PER = 300, 60


def layer(images: Tensor, weights: Tensor, *, owners: Tensor | None = None, skew: float = 1.0) -> CrossedLayer:
    """The update of two directions of ``PER`` bins for ``images`` ``(N, PIXELS)``, each pulling with its own weight."""
    towards = torch.zeros(2, PIXELS)
    towards[0, 0] = towards[1, 1] = 1
    edges = torch.arange(PER, dtype=torch.float64).div(PER)
    neurons = 2 * PER + (0 if owners is None else int(owners.max()) + 1)
    weight, bias = torch.zeros(neurons, PIXELS), torch.zeros(neurons, dtype=torch.float64)
    for row, (image, pull) in enumerate(zip(images, weights.tolist(), strict=True)):
        cells = [int(image[0] * PER), PER + int(image[1] * PER)] + ([] if owners is None else [2 * PER + int(owners[row])])
        for cell in cells:
            weight[cell] += pull * image
            bias[cell] += pull * skew
    lower = torch.cat([edges, edges, torch.zeros(neurons - 2 * PER)])
    clients = neurons - 2 * PER
    return CrossedLayer(weight=weight, bias=bias, towards=towards, lower=lower, upper=lower + 1 / PER, clients=clients)


def drawn(count: int) -> tuple[Tensor, Tensor]:
    rng = torch.Generator().manual_seed(4)
    images = torch.rand(count, PIXELS, generator=rng)
    images[:, :2] = (torch.rand(count, 2, generator=rng) * PER).floor().add(0.5).div(PER)
    return images, torch.randn(count, generator=rng)


def test_images_come_back_to_the_last_digits_and_are_believed() -> None:
    images, weights = drawn(12)
    found = layer(images, weights).read(most=12)
    assert len(found.images) == 12 and torch.cdist(images, found.images).amin(1).max() < 1e-3
    assert (found.confidence > 0.999).all() and not found.owner.any()


def test_each_image_is_given_to_its_client() -> None:
    images, weights = drawn(12)
    owners = torch.arange(12) % 3
    found = layer(images, weights, owners=owners).read(most=12)
    assert found.owner[torch.cdist(images, found.images).argmin(1)].tolist() == owners.tolist()


def test_a_wrong_bias_is_made_good_by_the_bins() -> None:
    images, weights = drawn(6)
    found = layer(images, weights, skew=1.04).read(most=6)
    nearest = torch.cdist(images, found.images).amin(1) / images.norm(dim=1)
    assert float(nearest.mean()) < 0.025 and (layer(images, weights, skew=1.04).read(most=6).confidence > 0.9).all()


def test_no_more_images_than_asked_and_none_of_an_empty_update() -> None:
    images, weights = drawn(12)
    assert len(layer(images, weights).read(most=5).images) == 5
    nothing = layer(images[:0], weights[:0]).read(most=5)
    assert nothing.images.shape == (0, PIXELS) and nothing.confidence.shape == (0,) and nothing.owner.shape == (0,)


def test_principal_directions_are_those_of_the_covariance() -> None:
    rng = torch.Generator().manual_seed(0)
    spread = torch.tensor([9.0, 4.0, 1.0, 0.5])
    images = (torch.randn(500, 4, generator=rng) * spread).view(500, 1, 2, 2)
    towards = principal_directions(images, count=2)
    seen = (images.flatten(1) - images.flatten(1).mean(0)) @ towards.T
    assert torch.allclose(seen.std(0), torch.ones(2), atol=0.01)
    assert torch.allclose(towards.abs(), torch.eye(4)[:2] / spread[:2, None], atol=0.02)


def test_mixed_directions_are_uncorrelated_and_use_many_components() -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.randn(400, 1, 8, 8, generator=rng) * torch.linspace(0.5, 2, 64).view(8, 8)
    towards = mixed_directions(images, count=3, rng=rng)
    seen = images.flatten(1) @ towards.T
    assert torch.allclose(torch.corrcoef(seen.T), torch.eye(3), atol=1e-3)
    assert torch.allclose(seen.std(0), torch.ones(3), atol=0.01)
    single = principal_directions(images, count=12)
    used = (towards @ torch.linalg.pinv(single)).abs() > 0.05
    assert int(used.any(0).sum()) == 12
