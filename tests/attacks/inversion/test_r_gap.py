from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import interpolate

from flpriv.attacks.inversion.r_gap import RGap
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")
ONE = LocalRecipe(lr=0.5, batch_size=1, steps=1)


def invert(capture: Capture, **options: Any) -> Reconstruction:
    (claim,) = RGap(**options)(capture)
    assert isinstance(claim, Reconstruction) and claim.objective is not None
    return claim


def small(records: Records, side: int) -> Records:
    return replace(records, images=interpolate(records.images, size=(side, side), mode="bilinear", antialias=True).clamp(0, 1))


@pytest.mark.parametrize(
    ("model", "options", "side"),
    [
        ("lenet", {}, 16),
        ("lenet", {"activation": "leaky-relu", "spread": 0.2}, 16),
        ("lenet", {"activation": "tanh", "spread": 0.2}, 20),
        ("cnn", {"width": 8, "activation": "sigmoid"}, 12),
        ("cnn", {"width": 12, "activation": "elu"}, 12),
        ("cnn", {"width": 12, "activation": "softplus"}, 12),
        (f"{NETS}:shallow", {"side": 24, "activation": "relu"}, 24),
        (f"{NETS}:nested", {"side": 16}, 16),
        ("flpriv.testing:dense_net", {"inputs": 1024, "width": 32}, 32),
    ],
)
def test_a_real_xray_comes_back(federate: Make, xrays: Any, psnr: Make, model: str, options: Any, side: int) -> None:
    records = small(xrays.private.take([1]), side)
    done = federate(records, recipe=ONE, model=model, options=options, classes=3, mean=0.5, std=0.25)
    claim = invert(done.capture)
    assert psnr(claim.images, done.used.images).item() >= 80
    assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()
    assert claim.objective is not None and float(claim.objective) < 1e-3


def test_noise_tells_nothing(federate: Make, xrays: Any, psnr: Make) -> None:
    done = federate(small(xrays.private.take([0]), 16), recipe=ONE, model="lenet")
    claim = invert(blindfold(done.capture))
    assert not len(claim.images) or psnr(claim.images, done.used.images).item() < 15
    assert claim.objective is not None and not bool((claim.objective < 0.5).any())


@pytest.mark.slow
@pytest.mark.parametrize("lr", [1.0, 0.05])
def test_larger_xrays_through_lenet(federate: Make, xrays: Any, psnr: Make, lr: float) -> None:
    """The LeNet of the gradient-leakage literature at 32×32 pixels."""
    found = []
    for place in range(3):
        records = small(xrays.private.take([place]), 32)
        done = federate(records, recipe=replace(ONE, lr=lr), model="lenet", mean=0.5, std=0.25, seed=place)
        found.append(psnr(invert(done.capture).images, done.used.images))
    assert torch.cat(found).min() >= 60


def test_volumes_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(1, (1, 4, 5, 6)), recipe=ONE, model="cnn", options={"width": 6, "activation": "softplus"})
    claim = invert(done.capture)
    assert claim.images.shape == (1, 1, 4, 5, 6)
    assert psnr(claim.images, done.used.images).item() >= 60


def test_no_image_is_made_up_where_ranks_do_not_suffice(federate: Make, smooth: Make) -> None:
    """Equations enough by number; ReLUs leave too few of them."""
    done = federate(smooth(1, (1, 12, 12)), recipe=ONE, model="cnn", options={"width": 8, "activation": "relu"})
    claim = invert(done.capture)
    assert claim.images.shape == (0, 1, 12, 12)
    assert claim.objective is not None and claim.objective.shape == (0,)


def test_an_update_of_nothing_gives_no_image(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1), recipe=ONE, model="lenet").capture
    (seen,) = capture.observations
    assert len(invert(replace(capture, observations=(replace(seen, returned=seen.sent),))).images) == 0


def test_the_recipe_is_not_needed(federate: Make, smooth: Make, psnr: Make) -> None:
    """Nor is the scale of the update: a clipped one tells as much."""
    capture = federate(smooth(1), recipe=ONE, model="lenet").capture
    (seen,) = capture.observations
    clipped = {key: seen.sent[key] + 0.3 * moved for key, moved in seen.update.items()}
    seen = replace(seen, returned=clipped, local=None, examples=None)
    claim = invert(replace(capture, observations=(seen,), granted=Can.SEE_UPDATES))
    assert psnr(claim.images, smooth(1).images).item() >= 60


def test_each_update_is_attacked(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1), recipe=ONE, model="lenet").capture
    (seen,) = capture.observations
    capture = replace(capture, observations=(seen, replace(seen, node=8), replace(seen, round=2)))
    assert [(c.round, c.node) for c in RGap()(capture) if isinstance(c, Reconstruction)] == [(1, 7), (1, 8)]
    assert [(c.round, c.node) for c in RGap(rounds=(), limit=1)(capture) if isinstance(c, Reconstruction)] == [(1, 7)]


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("resnet18", {}, r"r-gap: the model is a ResNet; R-GAP goes through an nn\.Sequential"),
        (f"{NETS}:shallow", {"side": 16, "activation": "gelu"}, "layer '1' is a GELU, which R-GAP cannot invert"),
        (f"{NETS}:starved", {"side": 16}, "layer '2' has 4096 inputs, which 128 outputs and 288 weights cannot tell"),
        (f"{NETS}:headless", {"side": 16}, "the last layer, '3', is not dense with a bias"),
        ("cnn", {"width": 32}, "layer 'conv2' has 8192 inputs to solve for, more than unknowns = 4096"),
    ],
)
def test_models_it_cannot_go_through_are_refused(federate: Make, smooth: Make, model: str, options: Any, message: str) -> None:
    with pytest.raises(FlprivError, match=message):
        invert(federate(smooth(1), recipe=replace(ONE, train_mode=False), model=model, options=options).capture)


def test_batches_and_steps_are_refused(federate: Make, smooth: Make) -> None:
    for recipe, records, what in (
        (LocalRecipe(batch_size=2, steps=1), smooth(2), "1 local steps on 2 images"),
        (LocalRecipe(batch_size=1, epochs=3), smooth(1), "3 local steps on 1 images"),
    ):
        with pytest.raises(FlprivError, match=rf"round 1, node 7: {what}.*local\.steps = 1"):
            invert(federate(records, recipe=recipe, model="lenet").capture)
    capture = federate(smooth(1), recipe=ONE, model="lenet").capture
    adam = replace(capture.observations[0], local=LocalRecipe(optimizer="adam", batch_size=1, steps=1))
    with pytest.raises(FlprivError, match="'adam'"):
        invert(replace(capture, observations=(adam,)))
