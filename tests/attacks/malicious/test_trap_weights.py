from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flpriv.attacks.malicious.trap_weights import TrapWeights
from flpriv.claim import Reconstruction
from flpriv.defense import Local
from flpriv.defenses.model_guard import ModelGuard
from flpriv.errors import ScenarioError
from flpriv.recipe import LocalRecipe
from flpriv.registry import create

Make = Callable[..., Any]


def test_a_random_half_of_each_row_is_negative_and_the_rest_is_scaled(smooth: Make) -> None:
    attack = TrapWeights(scale=0.5, sigma=2.0)
    weight, bias = attack.craft(smooth(4).images.flatten(1), neurons=300, rng=torch.Generator().manual_seed(0))
    assert weight.shape == (300, 256) and not bias.any()
    assert ((weight < 0).sum(1) == 128).all()
    assert ((weight < 0).double().mean(0) - 0.5).abs().max() < 0.15
    off, on = -weight[weight < 0], weight[weight > 0]
    assert float(off.square().mean().sqrt()) == pytest.approx(2, rel=0.02)
    assert float(on.square().mean().sqrt()) == pytest.approx(1, rel=0.02)


@pytest.mark.parametrize("batch", [4, 16, 64])
def test_the_scale_lets_one_pair_in_a_batch_fire(smooth: Make, batch: int) -> None:
    public, fresh = smooth(200, seed=1).images.flatten(1), smooth(200, seed=2).images.flatten(1)
    weight, _ = TrapWeights(batch=batch).craft(public, neurons=256, rng=torch.Generator().manual_seed(0))
    assert abs(float((public @ weight.T > 0).double().mean()) - 1 / batch) < 0.05 / batch
    assert abs(float((fresh @ weight.T > 0).double().mean()) - 1 / batch) < 0.3 / batch


def test_which_images_fire_does_not_depend_on_sigma(smooth: Make) -> None:
    images = smooth(50).images.flatten(1)
    fires = [
        images @ TrapWeights(sigma=sigma).craft(images, neurons=64, rng=torch.Generator().manual_seed(0))[0].T > 0
        for sigma in (1e-3, 0.5)
    ]
    assert float((fires[0] != fires[1]).double().mean()) < 1e-3


def test_the_variant_keeps_signs_and_fires_for_half_of_all_pairs(smooth: Make) -> None:
    images = smooth(100).images.flatten(1)
    rng = torch.Generator().manual_seed(0)
    weight, _ = TrapWeights(variant="mic-dkfz", sigma=0.5).craft(images, neurons=256, rng=rng)
    small = weight.abs() < 0.05
    assert abs(float(small.double().mean()) - 0.5) < 0.05
    assert abs(float((weight > 0).double().mean()) - 0.5) < 0.01
    assert 0.4 < float((images @ weight.T > 0).double().mean()) < 0.6


@pytest.mark.parametrize("attack", [TrapWeights(neurons=128, batch=8), TrapWeights(neurons=128, variant="mic-dkfz")])
def test_batches_come_back(federate: Make, smooth: Make, psnr: Make, attack: TrapWeights) -> None:
    """Three batches of six: at least 80 % at 30 dB or better."""
    good = 0
    recipe = LocalRecipe(lr=0.05, batch_size=6, steps=1)
    for seed in range(3):
        done = federate(smooth(6, seed=seed), recipe=recipe, attack=attack, public=smooth(60, seed=50), seed=seed)
        (claim,) = attack(done.capture)
        assert isinstance(claim, Reconstruction)
        good += int((psnr(claim.images, done.used.images) >= 30).sum())
    assert good >= 0.8 * 18


def test_the_model_guard_refuses_them_in_the_agreed_layers(federate: Make, smooth: Make) -> None:
    attack = TrapWeights(placement="parameters", scale=0.95)
    dense = {"model": "flpriv.testing:dense_net", "options": {"inputs": 4096, "classes": 2}}
    done = federate(smooth(4, (1, 64, 64)), attack=attack, **dense)
    (seen,) = done.capture.observations
    here = Local(site="A", round=1, rng=torch.Generator().manual_seed(0), task=done.capture.task, records=lambda: done.used)
    refusal = ModelGuard().inspect(seen.sent, local=here)
    assert refusal is not None and "sum to one side" in refusal.reason


def test_options_are_checked() -> None:
    with pytest.raises(ScenarioError, match=r"attack 'trap-weights': scale = 1\.5"):
        create("attacks", "trap-weights", {"scale": 1.5})
    with pytest.raises(ScenarioError, match="attack 'trap-weights': variant = 'dkfz'"):
        create("attacks", "trap-weights", {"variant": "dkfz"})
