from __future__ import annotations

import pytest
import torch
from torch import nn

from flpriv.attacks.site.features import features, pixel_statistics
from flpriv.errors import ScenarioError
from flpriv.task import Task


def build(model: str, shape: tuple[int, ...], **options: float) -> nn.Module:
    return Task(modality="x", shape=shape, classes=("a", "b"), model=model, options=options, mean=0.3, std=0.5).build().eval()


@pytest.mark.parametrize(
    ("model", "shape", "options", "width"),
    [
        ("cnn", (1, 12, 12), {"width": 6}, 12),
        ("cnn", (1, 8, 8, 8), {"width": 4}, 8),
        ("lenet", (1, 16, 16), {}, 12),
        ("resnet18", (1, 16, 16), {"widen": 0.25}, 128),
        ("densenet121", (1, 32, 32), {}, 1024),
    ],
)
def test_one_number_per_channel(model: str, shape: tuple[int, ...], options: dict[str, float], width: int) -> None:
    net = build(model, shape, **options)
    images = torch.rand(5, *shape, generator=torch.Generator().manual_seed(0))
    found = features(net, images, chunk=2)
    assert found.shape == (5, width)
    assert torch.allclose(found, features(net, images), atol=1e-5)


def test_a_flattened_map_is_averaged_over_space() -> None:
    net = build("cnn", (1, 12, 12), width=6)
    assert isinstance(net, nn.Sequential)
    images = torch.rand(4, 1, 12, 12)
    before = net[:4]((images - 0.3) / 0.5)
    assert torch.allclose(features(net, images), before.mean((2, 3)), atol=1e-6)


def test_a_dense_network_gives_its_last_hidden_layer() -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 2))
    images = torch.rand(3, 1, 4, 4)
    assert torch.allclose(features(net, images), net[:3](images))


def test_hooks_are_removed_and_a_model_without_dense_layer_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ScenarioError, match="this model has none"):
        features(net, torch.rand(2, 1, 6, 6))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in net.modules())


def test_pixel_statistics_are_what_they_say() -> None:
    image = torch.zeros(1, 1, 4, 4)
    image[..., 2:] = 1
    mean, std, *percentiles, down, across = pixel_statistics(image)[0].tolist()
    assert (mean, percentiles) == (0.5, [0, 0, 0, 0.5, 1, 1, 1])
    assert std == pytest.approx(float(image.std()))
    assert (down, across) == (0, pytest.approx(1 / 3))
    assert pixel_statistics(torch.rand(3, 1, 4, 5, 6)).shape == (3, 12)
