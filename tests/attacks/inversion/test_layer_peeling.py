from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d

from flpriv.attacks.inversion.exact import invert_exactly, suits
from flpriv.attacks.inversion.layer_peeling import LayerPeeling
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ThreatError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]
NET: dict[str, Any] = {"classes": 10, "mean": 0.5, "std": 0.25}


def step(images: int, **options: Any) -> LocalRecipe:
    return LocalRecipe(**({"lr": 0.1, "batch_size": images, "steps": 1, "train_mode": False} | options))


def invert(capture: Capture, **options: Any) -> Reconstruction:
    (claim,) = LayerPeeling(**options)(capture, seed=0)
    assert isinstance(claim, Reconstruction)
    return claim


def small(xrays: Any, images: int, *, side: int = 32, labels: int = 10) -> Records:
    """Real X-rays, no two of a label."""
    records: Records = xrays.private.take(range(images))
    return replace(records, images=avg_pool2d(records.images, 64 // side), labels=torch.arange(images) % labels)


@pytest.mark.parametrize(
    ("model", "images", "side"),
    [
        ("cnn", 4, 64),
        ("cnn", 8, 32),
        ("resnet18", 1, 32),
        pytest.param("resnet18", 4, 32, marks=pytest.mark.slow),
        pytest.param("resnet18", 1, 64, marks=pytest.mark.slow),
    ],
)
def test_real_xrays_come_back(federate: Make, xrays: Any, psnr: Make, model: str, images: int, side: int) -> None:
    done = federate(small(xrays, images, side=side), recipe=step(images), model=model, **NET)
    claim = invert(done.capture)
    order = torch.argsort(claim.labels) if claim.labels is not None else None
    assert order is not None and claim.labels is not None
    assert claim.labels[order].tolist() == sorted(done.used.labels.tolist())
    assert psnr(claim.images, done.used.images).min() >= 70
    assert claim.objective is not None and float(claim.objective) < 1e-3
    assert claim.sensitivity is None and claim.method == "exact: layer by layer"


@pytest.mark.parametrize("recipe", [{"weight_decay": 0.05}, {"lr": 0.01}, {"lr": 1.0, "momentum": 0.9}], ids=str)
def test_whatever_the_recipe(federate: Make, xrays: Any, psnr: Make, recipe: dict[str, Any]) -> None:
    done = federate(small(xrays, 3), recipe=step(3, **recipe), **NET)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 60


def test_clipped_updates_too(federate: Make, xrays: Any, psnr: Make) -> None:
    done = federate(small(xrays, 3), recipe=step(3), **NET)
    (seen,) = done.capture.observations
    clipped = {key: seen.sent[key] + 0.2 * moved for key, moved in seen.update.items()}
    claim = invert(replace(done.capture, observations=(replace(seen, returned=clipped),)))
    assert psnr(claim.images, done.used.images).min() >= 60


def test_a_trained_model_and_two_classes(federate: Make, xrays: Any, psnr: Make) -> None:
    before = replace(small(xrays, 40), labels=torch.arange(40) % 2)
    records = replace(small(xrays, 41).take([40]), labels=torch.tensor([1]))
    done = federate(records, recipe=step(1), classes=2, mean=0.5, std=0.25, before=before)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 60


def test_dense_layers_are_peeled_to_the_image(federate: Make, smooth: Make, psnr: Make) -> None:
    options = {"inputs": 256, "classes": 5}
    done = federate(smooth(3, labels=3), recipe=step(3), model="flpriv.testing:dense_net", options=options, classes=5, std=0.5)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 80


def test_volumes_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(2, (1, 12, 12, 12)), recipe=step(2), classes=4)
    assert psnr(invert(done.capture).images, done.used.images).min() >= 70


def test_without_evidence_nothing_comes_back(federate: Make, xrays: Any) -> None:
    done = federate(small(xrays, 2), recipe=step(2), **NET)
    assert len(invert(blindfold(done.capture)).images) == 0
    (seen,) = done.capture.observations
    assert len(invert(replace(done.capture, observations=(replace(seen, returned=seen.sent),))).images) == 0
    with pytest.raises(ThreatError):
        invert(replace(done.capture, granted=done.capture.granted & ~Can.SEE_UPDATES))


def test_statistics_of_the_batch_hide_it(federate: Make, smooth: Make) -> None:
    done = federate(smooth(2, (1, 32, 32)), recipe=step(2, train_mode=True), model="resnet18", classes=10)
    assert len(invert(done.capture).images) == 0


@pytest.mark.parametrize(
    ("recipe", "classes", "message"),
    [
        (LocalRecipe(batch_size=1, steps=2), 10, "2 local steps on 2 images"),
        (LocalRecipe(batch_size=2, steps=1), 2, "1 local steps on 2 images of 2 classes"),
        (LocalRecipe(batch_size=2, steps=1, optimizer="adam"), 10, "adam"),
    ],
)
def test_other_updates_are_refused(federate: Make, xrays: Any, recipe: LocalRecipe, classes: int, message: str) -> None:
    done = federate(small(xrays, 2, labels=classes), recipe=recipe, classes=classes)
    with pytest.raises(FlprivError, match=message):
        invert(done.capture)


def test_the_audit_tries_it_first(federate: Make, xrays: Any, psnr: Make) -> None:
    done = federate(small(xrays, 4), recipe=step(4), **NET)
    claim = invert_exactly(done.capture, done.capture.observations[0], rng=torch.Generator().manual_seed(0))
    assert claim is not None and claim.method == "exact: layer by layer"
    assert psnr(claim.images, done.used.images).min() >= 70
    assert "fewer images than classes" in (suits(done.capture.task) or "")
