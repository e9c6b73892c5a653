from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from flpriv.attacks.inversion.dlg import DLG
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]


def found(capture: Capture, *, seed: int = 0, **options: Any) -> Reconstruction:
    (claim,) = DLG(exact=False, device="cpu", **options)(capture, seed=seed)
    assert isinstance(claim, Reconstruction) and claim.labels is not None and claim.objective is not None
    return claim


@pytest.mark.parametrize("label", [0, 2])
def test_labels_are_found_with_the_image(federate: Make, smooth: Make, psnr: Make, label: int) -> None:
    """Those captured do not help: they are wrong here. Where one start diverges, another does not."""
    records = replace(smooth(1, (1, 16, 16)), labels=torch.tensor([label]))
    done = federate(records, model="lenet", classes=3, grant=("know-labels",))
    (seen,) = done.capture.observations
    misled = replace(done.capture, observations=(replace(seen, labels=(seen.labels + 1) % 3),))
    claim = found(misled, iterations=200, restarts=2)
    assert claim.labels is not None and claim.labels.tolist() == [label]
    assert psnr(claim.images, done.used.images).item() >= 22


def test_a_batch_has_a_label_for_each_image(federate: Make, smooth: Make) -> None:
    done = federate(smooth(3), recipe=LocalRecipe(lr=0.05, batch_size=3, steps=1), classes=4)
    claim = found(done.capture, iterations=5, restarts=2)
    assert claim.images.shape == (3, 1, 16, 16) and claim.labels is not None and claim.labels.shape == (3,)
    assert bool(((claim.images >= 0) & (claim.images <= 1)).all())


@pytest.mark.slow
def test_real_xrays_come_back_from_the_sigmoid_lenet_at_40_db(federate: Make, xrays: Any, psnr: Make) -> None:
    """32×32 pixels, the network of the paper at its initial weights, two restarts, nothing granted."""
    for place in range(4):
        records = xrays.private.take([place])
        done = federate(replace(records, images=avg_pool2d(records.images, 2)), model="lenet", seed=place)
        claim = found(done.capture, seed=place)
        assert psnr(claim.images, done.used.images).item() >= 40
        assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()
