from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.dense_relu import DenseReLU
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")
DENSE = "flpriv.testing:dense_net"


def invert(capture: Capture, *, seed: int = 0, **options: Any) -> Reconstruction:
    (claim,) = DenseReLU(**options)(capture, seed=seed)
    assert isinstance(claim, Reconstruction)
    return claim


def one_step(batch: int, *, lr: float = 0.1) -> LocalRecipe:
    return LocalRecipe(lr=lr, batch_size=batch, steps=1)


def in_turn(records: Records, *, classes: int = 2) -> Records:
    return replace(records, labels=torch.arange(len(records)) % classes)


def labels_of(claim: Reconstruction, used: Records) -> list[int]:
    """The claimed label of each original's nearest image."""
    assert claim.labels is not None
    near = torch.cdist(used.images.flatten(1), claim.images.flatten(1)).argmin(1)
    return [int(label) for label in claim.labels[near]]


@pytest.fixture(scope="module")
def large(test_data: Path) -> Records:
    """Real chest X-rays of 224×224 pixels."""
    import numpy as np
    from PIL import Image

    files = sorted((test_data / "xray_folder" / "test").glob("*/*.jp*g"))[::8]
    images = [torch.from_numpy(np.asarray(Image.open(file).convert("L"), dtype=np.float32) / 255) for file in files]
    return Records(images=torch.stack(images)[:, None], labels=torch.arange(len(files)) % 2)


@pytest.mark.parametrize("lr", [1.0, 0.1, 0.01])
@pytest.mark.parametrize(("mean", "std"), [(0.5, 0.25), (0.0, 1.0)], ids=["normalised", "raw"])
@pytest.mark.parametrize("model", [DENSE, f"{NETS}:mlp"], ids=["one hidden layer", "two"])
def test_eight_real_xrays_come_back_exactly(
    federate: Make, xrays: Any, psnr: Make, lr: float, mean: float, std: float, model: str
) -> None:
    """Through a real update in float32; learning rates shrink it towards its rounding."""
    options = {"inputs": 64 * 64, "classes": 2} | ({"width": 400} if model == DENSE else {"widths": (400, 200)})
    done = federate(
        in_turn(xrays.private.take(range(8))), recipe=one_step(8, lr=lr), model=model, options=options, mean=mean, std=std
    )
    claim = invert(done.capture)
    assert psnr(claim.images, done.used.images).min() >= 90
    assert labels_of(claim, done.used) == done.used.labels.tolist()
    assert claim.confidence is not None and claim.confidence.tolist() == [1.0] * 8


@pytest.mark.parametrize("lr", [1.0, pytest.param(0.1, marks=pytest.mark.slow), pytest.param(0.01, marks=pytest.mark.slow)])
def test_eight_large_xrays_come_back_exactly(federate: Make, large: Records, psnr: Make, lr: float) -> None:
    options = {"inputs": 224 * 224, "widths": (400, 200)}
    done = federate(large.take(range(8)), recipe=one_step(8, lr=lr), model=f"{NETS}:mlp", options=options, mean=0.5, std=0.25)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 90


@pytest.mark.slow
@pytest.mark.parametrize(("batch", "width"), [(16, 400), (12, 1000), (16, 1000), (24, 1000)])
@pytest.mark.parametrize("lr", [1.0, 0.01])
def test_larger_batches_come_back_exactly(federate: Make, xrays: Any, psnr: Make, batch: int, width: int, lr: float) -> None:
    options = {"inputs": 64 * 64, "widths": (width, 200)}
    records = in_turn(xrays.private.take(range(batch)))
    done = federate(records, recipe=one_step(batch, lr=lr), model=f"{NETS}:mlp", options=options, mean=0.5, std=0.25)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 90


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.01, batch_size=8, epochs=3),
        LocalRecipe(lr=0.01, batch_size=8, epochs=2, momentum=0.9, weight_decay=0.01),
        LocalRecipe(lr=0.01, batch_size=4, epochs=1),
        LocalRecipe(lr=0.01, batch_size=2, epochs=2),
    ],
    ids=["steps on one batch", "momentum and decay", "two batches", "two epochs of four batches"],
)
def test_whole_epochs_come_back_where_few_neurons_turn(federate: Make, xrays: Any, psnr: Make, recipe: LocalRecipe) -> None:
    options = {"inputs": 64 * 64, "widths": (400, 200)}
    records = in_turn(xrays.private.take(range(8)))
    done = federate(records, recipe=recipe, model=f"{NETS}:mlp", options=options, mean=0.5, std=0.25)
    assert psnr(invert(done.capture, agreement=0.9).images, done.used.images).min() >= 90


def test_the_batch_size_and_the_recipe_need_not_be_known(federate: Make, xrays: Any, psnr: Make) -> None:
    options = {"inputs": 64 * 64, "width": 400, "classes": 2}
    capture = federate(in_turn(xrays.private.take(range(5))), recipe=one_step(5), model=DENSE, options=options, mean=0.5).capture
    seen = replace(capture.observations[0], local=None, examples=None, labels=None)
    claim = invert(replace(capture, granted=Can.SEE_UPDATES, public=None, observations=(seen,)))
    assert psnr(claim.images, xrays.private.take(range(5)).images).min() >= 90


def test_clipping_does_not_help(federate: Make, xrays: Any, psnr: Make) -> None:
    options = {"inputs": 64 * 64, "width": 400, "classes": 2}
    done = federate(in_turn(xrays.private.take(range(8))), recipe=one_step(8), model=DENSE, options=options, mean=0.5, std=0.25)
    (seen,) = done.capture.observations
    clipped = {key: seen.sent[key] + 0.1 * moved for key, moved in seen.update.items()}
    claim = invert(replace(done.capture, observations=(replace(seen, returned=clipped),)))
    assert psnr(claim.images, done.used.images).min() >= 90


def test_noise_does(federate: Make, xrays: Any) -> None:
    """Noise of a tenth of the update, and noise alone: no image is claimed."""
    options = {"inputs": 64 * 64, "width": 400, "classes": 2}
    done = federate(in_turn(xrays.private.take(range(8))), recipe=one_step(8), model=DENSE, options=options, mean=0.5, std=0.25)
    (seen,) = done.capture.observations
    rng = torch.Generator().manual_seed(0)
    noisy = {
        key: seen.returned[key] + 0.1 * moved.square().mean().sqrt() * torch.randn(moved.shape, generator=rng)
        for key, moved in seen.update.items()
    }
    for capture in (replace(done.capture, observations=(replace(seen, returned=noisy),)), blindfold(done.capture)):
        claim = invert(capture, samples=20_000)
        assert claim.images.shape == (0, 1, 64, 64)
        assert claim.confidence is not None and len(claim.confidence) == 0


def test_too_many_images_for_the_layer_give_none(federate: Make, smooth: Make) -> None:
    """Nearly as many images as neurons have full rank but no kernels: silence, not wrong images."""
    done = federate(smooth(30), recipe=one_step(30), model=DENSE, options={"width": 40, "classes": 2})
    assert len(invert(done.capture, samples=5000).images) == 0


def test_a_single_image_and_volumes(federate: Make, smooth: Make, psnr: Make) -> None:
    one = federate(smooth(1), recipe=one_step(1), model=DENSE, options={"classes": 2})
    claim = invert(one.capture)
    assert psnr(claim.images, one.used.images).item() >= 90
    assert claim.labels is not None and claim.labels.tolist() == one.used.labels.tolist()
    many = federate(
        smooth(5, (1, 7, 8, 9)),
        recipe=one_step(5),
        model=DENSE,
        options={"inputs": 504, "width": 300, "classes": 2},
        mean=0.5,
        std=0.2,
    )
    claim = invert(many.capture)
    assert claim.images.shape == (5, 1, 7, 8, 9)
    assert psnr(claim.images, many.used.images).min() >= 90


def test_each_update_is_attacked(federate: Make, xrays: Any, psnr: Make) -> None:
    options = {"inputs": 64 * 64, "width": 300, "classes": 2}
    dones = [
        federate(
            in_turn(xrays.private.take(range(first, first + 4))),
            recipe=one_step(4),
            model=DENSE,
            options=options,
            mean=0.5,
            std=0.25,
        )
        for first in (0, 4)
    ]
    seen = tuple(replace(done.capture.observations[0], node=node) for done, node in zip(dones, (7, 8), strict=True))
    claims = DenseReLU()(replace(dones[0].capture, observations=seen))
    assert [claim.node for claim in claims if isinstance(claim, Reconstruction)] == [7, 8]
    for claim, done in zip(claims, dones, strict=True):
        assert isinstance(claim, Reconstruction) and psnr(claim.images, done.used.images).min() >= 90
    assert len(DenseReLU(limit=1)(replace(dones[0].capture, observations=seen))) == 1


def test_what_it_cannot_do_is_said(federate: Make, smooth: Make) -> None:
    with pytest.raises(FlprivError, match=r"the first layer, '1', is not followed by a ReLU"):
        invert(
            federate(smooth(2), recipe=one_step(2), model=f"{NETS}:before", options={"inputs": 256, "what": "sigmoid"}).capture
        )
    with pytest.raises(FlprivError, match=r"'conv1', is a Conv2d"):
        invert(federate(smooth(2), recipe=one_step(2)).capture)
    wide = federate(smooth(40), recipe=one_step(40), model=DENSE, options={"width": 40, "classes": 2}).capture
    with pytest.raises(FlprivError, match=r"round 1, node 7: 40 images are behind the update of 40 neurons.*local\.batch_size"):
        invert(wide)
    adam = replace(wide.observations[0], local=LocalRecipe(optimizer="adam", batch_size=4, steps=1))
    with pytest.raises(FlprivError, match="'adam'"):
        invert(replace(wide, observations=(adam,)))
