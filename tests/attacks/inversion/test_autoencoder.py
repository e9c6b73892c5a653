from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.autoencoder import Autoencoder
from flpriv.attacks.inversion.plan import Space
from flpriv.measures.images import mse, psnr

Make = Callable[..., Any]
CPU = torch.device("cpu")


def through(space: Space, images: Tensor) -> Tensor:
    labels = torch.zeros(len(images), dtype=torch.long)
    return space.decode(space.encode(images, labels), labels)[0].detach()


def quality(found: Tensor, images: Tensor) -> float:
    return float(psnr(mse(found, images)).mean())


def test_unseen_xrays_pass_an_eighth_of_the_numbers(xrays: Any) -> None:
    """Better through learned latents than through as many pixels, and better for the training."""
    public, unseen = xrays.public.images, xrays.private.images[:64]
    labels = torch.zeros(64, dtype=torch.long)
    learned = Autoencoder(steps=150)
    space = learned.space(public, device=CPU)
    assert space.encode(unseen, labels)[0].numel() * 8 == unseen[0].numel()
    begun = learned.build((1, 64, 64), seed=0)
    begun.begin(public)
    components = quality(begun.decode(begun.encode(unseen)).detach(), unseen)
    assert components >= 29
    assert quality(through(space, unseen), unseen) >= components + 0.2


@pytest.mark.parametrize("shape", [(1, 24, 16), (3, 17, 30), (1, 8, 12, 16), (3, 7, 9, 10)])
def test_any_size_two_or_three_axes(smooth: Make, shape: tuple[int, ...]) -> None:
    images = smooth(6, shape).images
    space = Autoencoder(steps=2, batch=2).space(images, device=CPU)
    back = through(space, images)
    assert back.shape == images.shape
    assert quality(back, images) > quality(images.mean(0, keepdim=True).expand_as(images), images) + 2


def test_latents_have_a_mean_square_of_one(smooth: Make) -> None:
    images = smooth(32, (1, 32, 32)).images
    latents = Autoencoder(steps=1).space(images, device=CPU).encode(images, torch.zeros(32, dtype=torch.long))
    sizes = latents.transpose(0, 1).flatten(1).square().mean(1)
    assert torch.allclose(sizes, torch.ones_like(sizes), atol=0.15)


def test_images_of_one_colour_are_no_trouble() -> None:
    images = torch.full((2, 1, 16, 16), 0.25)
    assert torch.allclose(through(Autoencoder(steps=1).space(images, device=CPU), images), images, atol=1e-2)


def test_it_follows_from_the_seed_and_is_kept(smooth: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = smooth(6).images
    short = Autoencoder(steps=2)
    one = through(short.space(images, device=CPU), images)
    assert not torch.equal(one, through(short.space(images, device=CPU, seed=1), images))
    with monkeypatch.context() as patch:
        patch.setattr(Autoencoder, "learn", None)
        assert torch.equal(one, through(short.space(images, device=CPU), images))
        with pytest.raises(TypeError):
            short.space(smooth(6, seed=1).images, device=CPU)
    monkeypatch.setenv("FLPRIV_CACHE", str(tmp_path / "another"))
    torch.manual_seed(9)
    state = torch.random.get_rng_state()
    assert torch.equal(one, through(short.space(images, device=CPU), images))
    assert torch.equal(state, torch.random.get_rng_state())
