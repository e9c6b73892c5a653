from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flpriv.attacks.malicious.qbi import QBI
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]

BATCH = LocalRecipe(lr=0.05, batch_size=16, steps=1)


@pytest.mark.parametrize("batch", [2, 8, 32])
def test_each_neuron_lets_one_image_of_a_batch_through(smooth: Make, batch: int) -> None:
    public, fresh = smooth(320, seed=1).images.flatten(1), smooth(320, seed=2).images.flatten(1)
    weight, bias = QBI(batch=batch).craft(public, neurons=200, rng=torch.Generator().manual_seed(0))
    share = (public @ weight.T + bias > 0).double().mean(0)
    assert (share - 1 / batch).abs().max() < 0.01
    assert abs(float((fresh @ weight.T + bias > 0).double().mean()) - 1 / batch) < 0.3 / batch


def test_rows_are_normal_and_gain_is_their_scale_alone(smooth: Make) -> None:
    public = smooth(64).images.flatten(1)
    (weight, bias), (wide, far) = (
        QBI(gain=gain).craft(public, neurons=50, rng=torch.Generator().manual_seed(0)) for gain in (1e-3, 0.1)
    )
    assert torch.allclose(100 * weight, wide, rtol=1e-4) and torch.allclose(100 * bias, far, rtol=1e-3, atol=1e-6)
    assert abs(float((public @ weight.T).std(0).mean()) - 1e-3) < 1e-5
    ordered = (weight / weight.std()).flatten().sort().values
    normal = torch.special.ndtri((torch.arange(len(ordered)) + 0.5) / len(ordered))
    assert (ordered - normal).abs().mean() < 0.02


@pytest.mark.parametrize("public", [True, False])
def test_images_that_share_all_their_neurons_come_back_as_well(federate: Make, smooth: Make, psnr: Make, public: bool) -> None:
    """Of 64 images on 48 neurons more come back than are alone in a row, with public images and without."""
    attack = QBI(neurons=48, batch=5)
    known = smooth(100, seed=50) if public else None
    good = lone = 0
    for seed in range(4):
        done = federate(smooth(16, seed=seed), attack=attack, public=known, seed=seed, recipe=BATCH)
        (seen,) = done.capture.observations
        (key,) = (k for k in seen.sent if k.endswith("neurons.weight"))
        fires = done.used.images.flatten(1) @ seen.sent[key].T + seen.sent[key.replace("weight", "bias")] > 0
        lone += int(fires[:, fires.sum(0) == 1].any(1).sum())
        (claim,) = attack(done.capture)
        assert isinstance(claim, Reconstruction)
        good += int((psnr(claim.images, done.used.images) >= 30).sum())
    assert good > lone
    assert good >= 28
