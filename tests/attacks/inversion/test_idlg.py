from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from flpriv.attacks.inversion.idlg import IDLG
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]


def found(capture: Capture, *, seed: int = 0, **options: Any) -> Reconstruction:
    (claim,) = IDLG(exact=False, device="cpu", **options)(capture, seed=seed)
    assert isinstance(claim, Reconstruction) and claim.labels is not None
    return claim


@pytest.mark.parametrize("label", range(4))
def test_the_label_is_read_before_any_search(federate: Make, smooth: Make, label: int) -> None:
    records = replace(smooth(1), labels=torch.tensor([label]))
    claim = found(federate(records, model="lenet", classes=4).capture, iterations=1)
    assert claim.labels is not None and claim.labels.tolist() == [label]


def test_an_image_comes_back_exactly_from_the_small_cnn(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(1, (1, 16, 16), seed=3))
    assert psnr(found(done.capture, iterations=250, restarts=1).images, done.used.images).item() >= 60


def test_images_of_two_steps_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=2, train_mode=False)
    done = federate(smooth(2, seed=3), recipe=recipe, grant=("know-labels", "know-order"))
    assert psnr(found(done.capture, iterations=150, restarts=1).images, done.used.images).min() >= 22


@pytest.mark.slow
def test_a_real_xray_comes_back_from_the_sigmoid_lenet_at_40_db(federate: Make, xrays: Any, psnr: Make) -> None:
    records = xrays.private.take([1])
    done = federate(replace(records, images=avg_pool2d(records.images, 2)), model="lenet", seed=1)
    claim = found(done.capture)
    assert psnr(claim.images, done.used.images).item() >= 40
    assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()
