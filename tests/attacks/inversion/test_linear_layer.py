from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.linear_layer import LinearLayer, read
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]
ONE = LocalRecipe(lr=0.05, batch_size=1, steps=1)
DENSE = "flpriv.testing:dense_net"


def invert(capture: Capture, **options: Any) -> list[Reconstruction]:
    claims = LinearLayer(**options)(capture)
    assert all(isinstance(claim, Reconstruction) for claim in claims)
    return [claim for claim in claims if isinstance(claim, Reconstruction)]


def products(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = torch.Generator().manual_seed(seed)
    bias, x = torch.randn(30, generator=rng).double(), torch.rand(50, generator=rng).double()
    return torch.outer(bias, x), bias, x


def test_an_outer_product_is_taken_apart() -> None:
    weight, bias, x = products()
    found, explained = read(weight, bias)
    assert torch.allclose(found, x, atol=1e-12)
    assert explained == pytest.approx(1, abs=1e-6)


def test_missing_entries_do_not_matter() -> None:
    weight, bias, x = products()
    kept = torch.rand(weight.shape, generator=torch.Generator().manual_seed(1)) < 0.3
    found, explained = read(weight * kept, bias)
    assert torch.allclose(found, x, atol=1e-12)
    assert explained == pytest.approx(1, abs=1e-6)


def test_neurons_average_noise() -> None:
    """Least squares over 30 neurons is nearer than the quotient at any single one."""
    weight, bias, x = products()
    noisy = weight + 1e-3 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)).double()
    single = torch.stack([(noisy[k] / bias[k] - x).square().mean() for k in range(len(bias))])
    found, explained = read(noisy, bias)
    assert (found - x).square().mean() < single.min()
    assert 0.99 < explained < 1


def test_nothing_is_read_from_nothing() -> None:
    weight, bias, _ = products()
    assert read(torch.zeros_like(weight), bias)[1] == 0
    assert read(weight, torch.zeros_like(bias))[1] == 0


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.25)])
def test_a_real_xray_comes_back_exactly(federate: Make, xrays: Any, psnr: Make, mean: float, std: float) -> None:
    for place in range(3):
        done = federate(
            xrays.private.take([place]), recipe=ONE, model=DENSE, options={"inputs": 64 * 64, "classes": 2}, mean=mean, std=std
        )
        (claim,) = invert(done.capture)
        assert psnr(claim.images, done.used.images).item() >= 90
        assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()
        assert claim.confidence is not None and float(claim.confidence) > 0.999
        assert (claim.round, claim.node) == (1, 7)


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.05, batch_size=1, steps=6),
        LocalRecipe(lr=0.05, batch_size=4, epochs=3, momentum=0.9),
        LocalRecipe(lr=0.02, batch_size=1, epochs=4, momentum=0.5, weight_decay=0.05),
    ],
    ids=["steps", "epochs with momentum", "weight decay"],
)
def test_any_number_of_steps_on_one_image(federate: Make, smooth: Make, psnr: Make, recipe: LocalRecipe) -> None:
    done = federate(smooth(1, seed=5), recipe=recipe, model=DENSE, options={"classes": 2})
    (claim,) = invert(done.capture)
    assert psnr(claim.images, done.used.images).item() >= 90
    assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()


def test_volumes_and_colours_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    for shape in ((1, 6, 7, 8), (3, 9, 10)):
        done = federate(
            smooth(1, shape), recipe=ONE, model=DENSE, options={"inputs": int(torch.tensor(shape).prod()), "classes": 2}
        )
        (claim,) = invert(done.capture)
        assert claim.images.shape == (1, *shape)
        assert psnr(claim.images, done.used.images).item() >= 90


def test_the_recipe_is_not_needed(federate: Make, smooth: Make, psnr: Make) -> None:
    capture = federate(smooth(1), recipe=ONE, model=DENSE, options={"classes": 2}).capture
    seen = replace(capture.observations[0], local=None, examples=None)
    (claim,) = invert(replace(capture, observations=(seen,), granted=Can.SEE_UPDATES))
    assert psnr(claim.images, smooth(1).images).item() >= 90


def test_noise_tells_nothing(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(1), recipe=ONE, model=DENSE, options={"classes": 2})
    (claim,) = invert(blindfold(done.capture))
    assert psnr(claim.images, done.used.images).item() < 15
    assert claim.confidence is not None and float(claim.confidence) < 0.2


def test_an_update_of_nothing_gives_no_image(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1), recipe=ONE, model=DENSE, options={"classes": 2}).capture
    (seen,) = capture.observations
    (claim,) = invert(replace(capture, observations=(replace(seen, returned=seen.sent),)))
    assert claim.images.shape == (0, 1, 16, 16)
    assert claim.labels is not None and len(claim.labels) == 0


def test_each_update_is_attacked(federate: Make, smooth: Make, psnr: Make) -> None:
    used = [smooth(1, seed=seed) for seed in range(3)]
    seen = [federate(one, recipe=ONE, model=DENSE, options={"classes": 2}) for one in used]
    places = ((1, 7), (1, 8), (2, 7))
    observations = tuple(
        replace(done.capture.observations[0], round=round, node=node) for done, (round, node) in zip(seen, places, strict=True)
    )
    capture = replace(seen[0].capture, observations=observations)
    claims = invert(capture, rounds=())
    assert [(claim.round, claim.node) for claim in claims] == list(places)
    assert all(psnr(claim.images, one.images).item() >= 90 for claim, one in zip(claims, used, strict=True))
    assert len(invert(capture)) == 2 and len(invert(capture, limit=1)) == 1
    with pytest.raises(FlprivError, match="no honest update was captured in rounds 9"):
        invert(capture, rounds=(9,))


def test_what_it_cannot_do_is_said(federate: Make, smooth: Make) -> None:
    many = federate(smooth(4), recipe=LocalRecipe(batch_size=4, steps=1), model=DENSE, options={"classes": 2}).capture
    with pytest.raises(FlprivError, match=r"linear-layer: round 1, node 7: 4 images are behind the update.*'dense-relu'"):
        invert(many)
    with pytest.raises(FlprivError, match=r"the first layer with weights, 'conv1', is a Conv2d"):
        invert(federate(smooth(1)).capture)
    adam = replace(many.observations[0], local=LocalRecipe(optimizer="adam", batch_size=1, steps=1))
    with pytest.raises(FlprivError, match=r"linear-layer: the sites train with 'adam'"):
        invert(replace(many, observations=(adam,)))
