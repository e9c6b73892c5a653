"""Mixtures made by hand, where every column is known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.first_layer import FirstLayer
from flpriv.attacks.inversion.kernels import agreement_of, separate
from flpriv.attacks.inversion.mixture import Mixture, mixture

NEURONS, PIXELS = 120, 200
LAYER = FirstLayer(name="layer", neurons=NEURONS, rectified=True)


def made(
    images: int, *, noise: float = 0.0, alike: float = 0.0, shared: bool = False, seed: int = 0
) -> tuple[Tensor, Tensor, Mixture | None]:
    """Images ``(B, P)``, what they send ``(K, B)`` and their mixture.

    ``alike`` pulls the images to their mean; ``shared`` lets all send the same but for a factor where they turn a neuron on, as
    two classes and no further hidden layer do: columns then have sparse differences.
    """
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(images, PIXELS, generator=rng).double()
    x = (1 - alike) * x + alike * x.mean(0) * images**0.5
    weight, bias = torch.randn(NEURONS, PIXELS, generator=rng).double(), torch.randn(NEURONS, generator=rng).double()
    on = (weight @ x.T + bias[:, None]) > 0
    sent = torch.randn(NEURONS, 1 if shared else images, generator=rng).double() * torch.randn(images, generator=rng).double()
    sends = sent * on
    gradient = sends @ x + noise * torch.randn(NEURONS, PIXELS, generator=rng).double()
    moved = {"layer.weight": gradient, "layer.bias": sends.sum(1)}
    return x, sends, mixture(moved, {"layer.weight": weight, "layer.bias": bias}, LAYER)


def nearest(found: Tensor, x: Tensor) -> float:
    """Largest distance of an image from the nearest one found, relative to its length."""
    return float((torch.cdist(x, found).amin(1) / x.norm(dim=1)).max())


@pytest.mark.parametrize("images", [1, 2, 7, 30])
@pytest.mark.parametrize("noise", [0.0, 1e-5])
def test_the_rank_is_the_number_of_images(images: int, noise: float) -> None:
    x, sends, mix = made(images, noise=noise)
    assert mix is not None and mix.images == images
    assert torch.allclose(mix.left @ mix.right, (sends @ x)[mix.neurons], atol=20 * noise + 1e-9)
    assert torch.allclose(mix.left @ mix.ones, sends.sum(1)[mix.neurons], atol=20 * noise + 1e-9)
    assert noise / 2 < mix.noise < 2 * noise or noise == 0


def test_noise_and_too_many_images_are_no_mixture() -> None:
    assert made(3, noise=10.0)[2] is None
    assert made(NEURONS)[2] is None


def test_true_columns_give_the_images() -> None:
    x, sends, mix = made(5)
    assert mix is not None
    kernels = torch.linalg.lstsq(mix.left, sends[mix.neurons]).solution * torch.tensor([1.0, -3.0, 0.1, 7.0, 1.0])
    found, read, on = mix.read(kernels)
    assert torch.allclose(found, x, atol=1e-8)
    assert torch.allclose(read, sends[mix.neurons], atol=1e-8)
    assert agreement_of(read, on).tolist() == [1.0] * 5


@pytest.mark.parametrize("shared", [False, True], ids=["own gradients", "shared gradients"])
@pytest.mark.parametrize("alike", [0.0, 0.6], ids=["unlike", "alike"])
@pytest.mark.parametrize(("images", "noise"), [(2, 0.0), (6, 0.0), (6, 1e-6), (10, 1e-7)])
def test_images_are_separated(images: int, noise: float, alike: float, shared: bool) -> None:
    x, _, mix = made(images, noise=noise, alike=alike, shared=shared)
    assert mix is not None
    kernels = separate(mix, rng=torch.Generator().manual_seed(0), samples=100_000, agreement=0.99, what="test")
    assert kernels is not None
    found, sends, on = mix.read(kernels)
    assert agreement_of(sends, on).min() >= 0.99
    assert nearest(found, x) < 1e-8 + 1e3 * noise


def test_a_layer_without_relu_is_not_borne_out() -> None:
    """Columns without zeros: nothing is found, or the images do not agree."""
    rng = torch.Generator().manual_seed(3)
    x, sends = torch.randn(4, PIXELS, generator=rng).double(), torch.randn(NEURONS, 4, generator=rng).double()
    weight, bias = torch.randn(NEURONS, PIXELS, generator=rng).double(), torch.randn(NEURONS, generator=rng).double()
    mix = mixture({"layer.weight": sends @ x, "layer.bias": sends.sum(1)}, {"layer.weight": weight, "layer.bias": bias}, LAYER)
    assert mix is not None and mix.images == 4
    kernels = separate(mix, rng=rng, samples=5000, agreement=0.95, what="test")
    assert kernels is None or agreement_of(*mix.read(kernels)[1:]).max() < 0.95


def test_equal_seeds_equal_kernels() -> None:
    _, _, mix = made(6)
    assert mix is not None
    one, two = (
        separate(mix, rng=torch.Generator().manual_seed(5), samples=20_000, agreement=0.99, what="test") for _ in range(2)
    )
    assert one is not None and two is not None and torch.equal(one, two)


def test_agreement_counts_both_kinds() -> None:
    sends = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    on = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    assert agreement_of(sends, on).tolist() == [1.0, (0.5 + 0.5) / 2]
