"""Every registered model: shapes, sizes, gradients, per-sample gradients."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from monai.networks.nets.resnet import resnet18, resnet50
from monai.networks.nets.segresnet import SegResNet
from opacus import GradSampleModule, PrivacyEngine
from opacus.validators import ModuleValidator
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from flpriv.clients.models.residual import out_of_place
from flpriv.clients.models.vit import Attention
from flpriv.errors import ScenarioError
from flpriv.registry import plugins
from flpriv.task import Task

FLAT, DEEP = (1, 32, 32), (1, 32, 32, 32)


def build(name: str, shape: tuple[int, ...] = FLAT, *, classes: int = 2, seed: int = 0, **options: Any) -> nn.Module:
    labels = tuple(f"class {number}" for number in range(classes))
    return Task(modality="xray", shape=shape, classes=labels, model=name, options=options).build(seed=seed)


def count(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def test_all_models_are_registered() -> None:
    assert set(plugins("models")) >= {"cnn", "lenet", "resnet18", "densenet121", "vit"}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        *((name, shape) for name in ("cnn", "lenet", "resnet18", "densenet121") for shape in (FLAT, (3, 33, 40), DEEP)),
        *(("vit", shape) for shape in (FLAT, (3, 32, 40), DEEP)),
    ],
)
def test_images_become_logits_and_every_weight_learns(name: str, shape: tuple[int, ...]) -> None:
    model = build(name, shape, classes=3)
    logits = model(torch.rand(2, *shape, generator=torch.Generator().manual_seed(0)))
    assert logits.shape == (2, 3)
    torch.autograd.backward(functional.cross_entropy(logits, torch.tensor([0, 2])))
    assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("name", "shape", "classes", "parameters"),
    [
        ("cnn", FLAT, 10, 182_666),
        ("lenet", (3, 32, 32), 10, 15_826),
        ("resnet18", (3, 64, 64), 1000, 11_689_512 + 896),  # MONAI's shortcuts have biases
        ("densenet121", (3, 64, 64), 1000, 7_978_856),
        ("vit", (3, 32, 32), 10, 24_704 + 17 * 128 + 4 * 132_096 + 256 + 1290),  # patches, positions, blocks, norm, head
    ],
)
def test_sizes_are_those_of_the_papers(name: str, shape: tuple[int, ...], classes: int, parameters: int) -> None:
    assert count(build(name, shape, classes=classes)) == parameters


@pytest.mark.parametrize("name", ["cnn", "lenet", "resnet18", "densenet121", "vit"])
def test_weights_follow_from_the_seed(name: str) -> None:
    one, again, other = (build(name, seed=seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[key], again[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_lenet_starts_wide_and_smooth() -> None:
    model = build("lenet")
    weights = torch.cat([parameter.flatten() for parameter in model.parameters()])
    assert -0.5 <= weights.min() < -0.49 and 0.49 < weights.max() <= 0.5
    assert sum(isinstance(module, nn.Sigmoid) for module in model.modules()) == 3


@pytest.mark.parametrize("name", ["cnn", "lenet"])
def test_the_activation_is_an_option(name: str) -> None:
    assert any(isinstance(module, nn.ELU) for module in build(name, activation="elu").modules())
    with pytest.raises(ScenarioError, match=f"model '{name}': activation = 'swish'"):
        build(name, activation="swish")


def test_densenet_says_when_images_are_too_small() -> None:
    with pytest.raises(ScenarioError, match="every side needs at least 32 pixels"):
        build("densenet121", (1, 28, 28))


def test_vit_wants_whole_patches_and_heads() -> None:
    assert build("vit", (1, 20, 30), patch=5).state_dict()["patch_embedding.position_embeddings"].shape == (1, 24, 128)
    with pytest.raises(ScenarioError, match="every side needs to be a multiple of patch = 8"):
        build("vit", (1, 32, 33))
    with pytest.raises(ScenarioError, match="hidden = 128 is no multiple of heads = 3"):
        build("vit", heads=3)


def test_attention_of_vit_is_that_of_torch() -> None:
    """``torch.nn.MultiheadAttention`` orders the same weights the same way."""
    torch.manual_seed(0)
    mine = Attention(24, heads=3, dropout=0.0)
    other = nn.MultiheadAttention(24, 3, batch_first=True)
    state = {"in_proj_weight": mine.qkv.weight, "out_proj.weight": mine.out_proj.weight, "out_proj.bias": mine.out_proj.bias}
    other.load_state_dict({**state, "in_proj_bias": torch.zeros(72)})
    tokens = torch.randn(2, 7, 24)
    torch.testing.assert_close(mine(tokens), other(tokens, tokens, tokens)[0])


def test_vit_in_train_mode_drops_and_in_eval_mode_does_not() -> None:
    model, images = build("vit", dropout=0.5), torch.rand(2, *FLAT)
    assert not torch.equal(model(images), model(images))
    assert torch.equal(model.eval()(images), model(images))


def test_images_need_two_or_three_dimensions() -> None:
    with pytest.raises(ScenarioError, match=r"it takes \(C, H, W\) or \(C, D, H, W\)"):
        build("cnn", (32, 32))


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (partial(resnet18, spatial_dims=2, n_input_channels=1, num_classes=2), FLAT),
        (partial(resnet50, spatial_dims=2, n_input_channels=1, num_classes=2, widen_factor=0.25), FLAT),
        (partial(SegResNet, spatial_dims=2, init_filters=8, in_channels=1), FLAT),
        (partial(SegResNet, spatial_dims=3, init_filters=8, in_channels=1), (1, 16, 16, 16)),
    ],
)
def test_out_of_place_changes_no_key_and_no_output(network: Callable[[], nn.Module], shape: tuple[int, ...]) -> None:
    original = network()
    fixed = out_of_place(copy.deepcopy(original))
    images = torch.rand(2, *shape)
    assert list(fixed.state_dict()) == list(original.state_dict())
    assert torch.equal(fixed.eval()(images), original.eval()(images))
    assert not any(getattr(module, "inplace", False) for module in fixed.modules())


@pytest.mark.parametrize("shape", [FLAT, (1, 16, 16, 16)])
@pytest.mark.parametrize(("name", "options"), [("resnet18", {"widen": 0.5}), ("vit", {"layers": 2})])
def test_per_sample_gradients(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    model = ModuleValidator.fix(build(name, shape, **options))
    images, labels = torch.rand(3, *shape), torch.tensor([0, 1, 1])
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    torch.autograd.backward(functional.cross_entropy(wrapped(images), labels, reduction="sum"))
    torch.autograd.backward(functional.cross_entropy(model(images[:1]), labels[:1]))
    for mine, alone in zip(wrapped.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(mine.grad_sample[0], alone.grad, rtol=1e-3, atol=1e-4)


def test_without_the_fix_per_sample_gradients_fail() -> None:
    original = ModuleValidator.fix(resnet18(spatial_dims=2, n_input_channels=1, num_classes=2, widen_factor=0.5))
    for module in original.modules():
        if isinstance(module, nn.ReLU):
            module.inplace = False
    with pytest.raises(RuntimeError, match="inplace"):
        torch.autograd.backward(functional.cross_entropy(GradSampleModule(original)(torch.rand(2, *FLAT)), torch.tensor([0, 1])))


@pytest.mark.parametrize("widen", [1.0, 0.125])
def test_resnet18_with_group_normalisation(widen: float) -> None:
    """No running statistics to average over unlike sites, and nothing for DP-SGD to mend."""
    model = build("resnet18", widen=widen, norm="group")
    norms = [module for module in model.modules() if isinstance(module, nn.GroupNorm)]
    assert len(norms) == sum(isinstance(module, nn.BatchNorm2d) for module in build("resnet18", widen=widen).modules())
    assert not list(model.buffers())
    assert ModuleValidator.is_valid(model)


def test_resnet18_under_opacus_trains_with_noise() -> None:
    model = ModuleValidator.fix(build("resnet18", widen=0.5))
    loader = DataLoader(TensorDataset(torch.rand(8, *FLAT), torch.arange(8) % 2), batch_size=4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = copy.deepcopy(model.state_dict())
    private, optimizer, loader = PrivacyEngine().make_private(
        module=model, optimizer=optimizer, data_loader=loader, noise_multiplier=1.0, max_grad_norm=1.0, poisson_sampling=False
    )
    for images, labels in loader:
        optimizer.zero_grad()
        torch.autograd.backward(functional.cross_entropy(private(images), labels))
        optimizer.step()
    assert all(not torch.equal(before[key], value) for key, value in model.state_dict().items() if "weight" in key)
