"""Healthy models pass, trapped ones are refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flpriv.clients.training import train
from flpriv.defense import Local
from flpriv.defenses.model_guard import ModelGuard
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import create, validate
from flpriv.task import Task

DENSE = {"inputs": 1024, "width": 128, "classes": 2}


def task(model: str, *, dims: int = 2, side: int = 32) -> Task:
    name, options = ("flpriv.testing:dense_net", DENSE) if model == "dense" else (model, {})
    return Task(modality="xray", shape=(1, *[side] * dims), classes=("a", "b"), model=name, options=options)


def here(agreed: Task | None, records: Records | None = None) -> Local:
    return Local(
        site="A", round=1, rng=torch.Generator().manual_seed(0), task=agreed, records=None if records is None else lambda: records
    )


def refusal(state: Mapping[str, Tensor], agreed: Task | None, records: Records | None = None, images: int = 256) -> str:
    found = ModelGuard(images=images).inspect(state, local=here(agreed, records))
    return "" if found is None else found.reason


@pytest.fixture(scope="session")
def xrays(test_data: Path) -> Records:
    stored = np.load(test_data / "medmnist" / "pneumoniamnist.npz")
    order = np.random.default_rng(0).permutation(len(stored["train_labels"]))[:256]
    images = torch.from_numpy(stored["train_images"][order].astype(np.float32))[:, None] / 255
    labels = torch.from_numpy(stored["train_labels"][order]).flatten().long()
    return Records(images=interpolate(images, size=(32, 32), mode="bilinear"), labels=labels)


@pytest.fixture(scope="session")
def volumes(test_data: Path) -> Records:
    stored = np.load(test_data / "medmnist" / "lidc_nodule3d.npz")
    images = torch.from_numpy(stored["train_images"][:96].astype(np.float32))[:, None] / 255
    labels = torch.from_numpy(stored["train_labels"][:96]).flatten().long()
    return Records(images=interpolate(images, size=(16, 16, 16), mode="trilinear"), labels=labels)


def trained(agreed: Task, records: Records, *, steps: int, optimizer: str = "sgd", lr: float = 0.05) -> Mapping[str, Tensor]:
    model = agreed.build(seed=3)
    recipe = validate(LocalRecipe, {"optimizer": optimizer, "lr": lr, "steps": steps}, where="test")
    train(model, records, recipe, classes=2, seed=1)
    return model.state_dict()


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(
    ("model", "dims"), [("cnn", 2), ("cnn", 3), ("lenet", 2), ("lenet", 3), ("resnet18", 2), ("resnet18", 3), ("densenet121", 2)]
)
def test_untrained_models_pass(model: str, dims: int, seed: int) -> None:
    agreed = task(model, dims=dims, side=32 if dims == 2 else 16)
    assert refusal(agreed.build(seed=seed).state_dict(), agreed) == ""


@pytest.mark.parametrize(("model", "steps"), [("cnn", 200), ("lenet", 400), ("dense", 400)])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 1e-3)])
def test_models_trained_on_xrays_pass(model: str, steps: int, optimizer: str, lr: float, xrays: Records) -> None:
    agreed = task(model)
    assert refusal(trained(agreed, xrays, steps=steps, optimizer=optimizer, lr=lr), agreed, xrays) == ""


@pytest.mark.parametrize("model", ["cnn", "lenet"])
def test_models_trained_on_volumes_pass(model: str, volumes: Records) -> None:
    agreed = task(model, dims=3, side=16)
    assert refusal(trained(agreed, volumes, steps=40, lr=0.01), agreed, volumes) == ""


@pytest.mark.slow
@pytest.mark.parametrize("model", ["resnet18", "densenet121"])
@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize(("optimizer", "lr"), [("sgd", 0.05), ("adam", 1e-3)])
def test_deep_models_trained_pass(model: str, dims: int, optimizer: str, lr: float, xrays: Records, volumes: Records) -> None:
    side = 16 if (model, dims) == ("resnet18", 3) else 32
    records = xrays if dims == 2 else volumes
    if records.images.shape[-1] != side:
        records = Records(images=interpolate(records.images, size=(side,) * 3, mode="trilinear"), labels=records.labels)
    agreed = task(model, dims=dims, side=side)
    state = trained(agreed, records, steps=60 if dims == 2 else 20, optimizer=optimizer, lr=lr)
    assert refusal(state, agreed, records) == ""


def test_the_imprint_block_is_refused_by_its_layer() -> None:
    agreed = task("cnn")
    attack = create("attacks", "imprint", {})
    public = Records(images=torch.rand(32, 1, 32, 32), labels=torch.zeros(32, dtype=torch.long))
    trap = attack.trap(agreed, public=public, rng=torch.Generator().manual_seed(0))
    armed = trap.arm(agreed.build().state_dict(), round=1, node=1, nodes=(1,))
    reason = refusal(armed, agreed)
    assert "not the agreed architecture" in reason and "is not part of the model" in reason
    assert "look alike" in refusal(armed, None)


def test_an_imprint_in_the_agreed_layers_is_refused() -> None:
    agreed = task("dense")
    state = dict(agreed.build().state_dict())
    rows = torch.randn(1024, generator=torch.Generator().manual_seed(1))
    state["1.weight"] = rows.repeat(128, 1) * torch.linspace(0.5, 2, 128)[:, None]
    reason = refusal(state, agreed)
    assert "'1.weight' look alike (median cosine 1.00" in reason
    some = dict(agreed.build().state_dict())
    some["1.weight"] = torch.cat([some["1.weight"][:90], state["1.weight"][:38]])
    assert "of the rows of layer '1.weight' have a twin" in refusal(some, agreed)


def test_a_model_that_sends_no_gradient_is_refused() -> None:
    agreed = task("cnn")
    silenced = {key: torch.zeros_like(value) for key, value in agreed.build().state_dict().items()}
    assert "all weights of layer 'conv1.weight' are zero" in refusal(silenced, agreed)


@pytest.mark.parametrize("scale", [0.5, 0.95])
def test_trap_weights_are_refused(scale: float) -> None:
    rng = torch.Generator().manual_seed(2)
    size = torch.randn(128, 64 * 64, generator=rng).abs() / 2
    negative = torch.rand(128, 64 * 64, generator=rng).argsort(1) < 2048
    assert "sum to one side" in refusal({"fc.weight": torch.where(negative, -size, scale * size)}, None)


@pytest.mark.parametrize("batch", [8, 64])
def test_neurons_that_fire_for_single_images_are_refused(batch: int, xrays: Records) -> None:
    agreed = task("dense")
    state = dict(agreed.build().state_dict())
    state["1.weight"] = torch.randn(128, 1024, generator=torch.Generator().manual_seed(3))
    state["1.bias"] = -torch.quantile(xrays.images.flatten(1) @ state["1.weight"].T, 1 - 1 / batch, dim=0)
    assert "'1' fire for a few single images" in refusal(state, agreed, xrays)
    assert refusal(state, agreed, xrays, images=0) == ""


def test_broken_and_foreign_models_are_refused_by_layer() -> None:
    agreed = task("cnn")
    state = dict(agreed.build().state_dict())
    assert "'fc.bias' holds NaN" in refusal(state | {"fc.bias": torch.tensor([0.0, torch.nan])}, agreed)
    assert "'fc.bias' has shape (3,)" in refusal(state | {"fc.bias": torch.zeros(3)}, agreed)
    assert "'fc.bias' holds torch.float64" in refusal(state | {"fc.bias": torch.zeros(2).double()}, agreed)
    assert "'fc.bias' is missing" in refusal({key: value for key, value in state.items() if key != "fc.bias"}, agreed)


def test_two_opposed_rows_of_a_head_are_healthy() -> None:
    row = torch.randn(1, 100)
    assert refusal({"fc.weight": torch.cat([row, -row])}, None) == ""
