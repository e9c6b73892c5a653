from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.malicious.passage import passage
from flpriv.errors import FlprivError
from flpriv.task import Task

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")


def task(
    model: str,
    shape: tuple[int, ...] = (1, 16, 16),
    *,
    options: Mapping[str, Any] | None = None,
    mean: float = 0.0,
    std: float = 1.0,
) -> Task:
    return Task(modality="xray", shape=shape, classes=("a", "b"), model=model, options=options or {}, mean=mean, std=std)


def seen_by(known: Task, layer: str, state: Mapping[str, Tensor], images: Tensor) -> Tensor:
    """What a layer is given under the honest model with ``state`` in it."""
    model = known.build(seed=3).eval()
    model.load_state_dict({**model.state_dict(), **state})
    kept: list[Tensor] = []
    model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    with torch.no_grad():
        model(images)
    return kept[0]


@pytest.mark.parametrize("normalised", [(0.0, 1.0), (0.4, 0.2)], ids=["raw", "normalised"])
@pytest.mark.parametrize(
    ("model", "shape", "options"),
    [
        ("flpriv.testing:dense_net", (1, 16, 16), {"inputs": 256, "classes": 2}),
        (f"{NETS}:strided", (1, 16, 16), {}),
        (f"{NETS}:strided", (2, 15, 15), {"channels": 2, "side": 15}),
        (f"{NETS}:strided", (1, 9, 9, 9), {"side": 9, "dims": 3}),
    ],
    ids=["dense", "strided", "odd side", "3D"],
)
def test_all_pixels_reach_the_layer_and_come_back(
    smooth: Make, model: str, shape: tuple[int, ...], options: Mapping[str, Any], normalised: tuple[float, float]
) -> None:
    mean, std = normalised
    known = task(model, shape, options=options, mean=mean, std=std)
    way = passage(known, who="test")
    images = smooth(3, shape).images
    assert way.exact
    assert torch.allclose(way.images(way.features(images)), images, atol=1e-5)


@pytest.mark.parametrize("normalised", [(0.0, 1.0), (0.4, 0.2)], ids=["raw", "normalised"])
@pytest.mark.parametrize("model", ["flpriv.testing:dense_net", f"{NETS}:strided"])
def test_the_layer_computes_what_it_was_given_for(smooth: Make, model: str, normalised: tuple[float, float]) -> None:
    mean, std = normalised
    known = task(model, options={"inputs": 256, "classes": 2} if model.endswith("dense_net") else {}, mean=mean, std=std)
    way = passage(known, who="test")
    rng = torch.Generator().manual_seed(0)
    images = smooth(5).images
    features = way.features(images)
    weight, bias = torch.randn(way.neurons, features.shape[1], generator=rng), torch.randn(way.neurons, generator=rng)
    entries = way.entries(weight, bias, rng=rng)
    given = seen_by(known, way.layer, entries, images)
    outputs = given @ entries[f"{way.layer}.weight"].T + entries[f"{way.layer}.bias"]
    assert torch.allclose(outputs, features @ weight.T + bias, atol=1e-3)
    again = way.sent(entries[f"{way.layer}.weight"], entries[f"{way.layer}.bias"])
    assert torch.allclose(again[0].float(), weight, atol=1e-4) and torch.allclose(again[1].float(), bias, atol=1e-3)
    onward = entries[f"{way.after}.weight"]
    assert torch.equal(onward, onward[:, :1].expand_as(onward)) and onward[0, 0] != onward[1, 0]


def test_what_the_layer_lost_is_told_in_pixels(smooth: Make) -> None:
    """A layer that sees (x - mean) / std loses d (x - mean) / std, from which d x follows."""
    known = task("flpriv.testing:dense_net", options={"inputs": 256, "classes": 2}, mean=0.4, std=0.2)
    way = passage(known, who="test")
    (image,) = smooth(1).images.flatten(1).double()
    numbers = torch.tensor([0.3, -2.0], dtype=torch.float64)
    lost, bias = way.lost(numbers[:, None] * (image - 0.4) / 0.2, numbers)
    assert torch.allclose(lost, numbers[:, None] * image) and torch.equal(bias, numbers)


@pytest.mark.parametrize(
    ("model", "options", "side", "grid"),
    [
        (f"{NETS}:strided", {"width": 1}, 16, (8, 8)),
        (f"{NETS}:Pooled", {}, 32, (8, 8)),
    ],
    ids=["few channels", "max pooling"],
)
def test_with_few_channels_or_pooling_a_coarser_image_gets_there(
    smooth: Make, model: str, options: Mapping[str, Any], side: int, grid: tuple[int, int]
) -> None:
    way = passage(task(model, (1, side, side), options=options, mean=0.4, std=0.2), who="test")
    images = smooth(4, (1, side, side)).images
    back = way.images(way.features(images))
    coarse = torch.nn.functional.adaptive_avg_pool2d(images, grid)
    assert not way.exact and way.grid == grid
    assert (back - images).square().mean().sqrt() < 0.1 < (images.mean((2, 3), keepdim=True) - images).square().mean().sqrt()
    assert (torch.nn.functional.adaptive_avg_pool2d(back, grid) - coarse).abs().mean() < 0.07


@pytest.mark.parametrize(
    ("model", "options", "why"),
    [
        ("cnn", {}, "the first dense layer, 'fc', is its last layer"),
        ("lenet", {}, "the first dense layer, 'fc', is its last layer"),
        ("resnet18", {}, "the first dense layer, 'fc', is its last layer"),
        ("densenet121", {}, "the first dense layer, 'class_layers.out', is its last layer"),
        ("vit", {}, "layer 'blocks.0.attn.qkv' sees parts of the image one by one"),
        (f"{NETS}:blocked", {"what": "norm", "side": 32}, "layer '1' before it is a BatchNorm2d"),
        (f"{NETS}:blocked", {"what": "tanh", "side": 32}, "what stands before layer '4' alters the image"),
        (f"{NETS}:blocked", {"what": "sigmoid", "side": 32}, "'1', is not followed by a ReLU and another dense layer"),
        (f"{NETS}:blocked", {"what": "average", "side": 32}, "no more than 1 numbers of each channel are left before layer '3'"),
        (f"{NETS}:blocked", {"what": "mirror", "side": 32}, "layer '0' is a convolution in groups or with unusual padding"),
    ],
)
def test_models_that_let_no_image_through_are_named_with_the_way_out(model: str, options: Mapping[str, Any], why: str) -> None:
    with pytest.raises(FlprivError) as caught:
        passage(task(model, (1, 32, 32), options=options), who="qbi")
    told = str(caught.value)
    assert told.startswith(f"qbi: model {model!r} has no hidden dense layer") and why in told
    assert told.endswith("set placement = 'inserted'")
