from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import unfold

from flpriv.attacks.inversion.patches import Convolution, design, meetings, patches


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv1d(2, 3, 3, padding=2, dilation=2), (9,)),
        (nn.Conv2d(2, 3, 3, padding=1), (5, 6)),
        (nn.Conv2d(2, 3, (3, 2), stride=2, padding=(1, 0)), (7, 6)),
        (nn.Conv2d(2, 3, 7, stride=2, padding=3, bias=False), (8, 8)),
        (nn.Conv3d(2, 3, 3, stride=2, padding=1), (4, 5, 6)),
    ],
    ids=["1D, dilated", "2D", "oblong", "stem", "3D"],
)
def test_the_design_gives_the_gradient_of_the_weights(layer: Convolution, size: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    layer = layer.double()
    inputs = torch.randn(4, 2, *size, generator=rng, dtype=torch.float64)
    outputs = layer(inputs)
    slopes = torch.randn(outputs.shape, generator=rng, dtype=torch.float64)
    (moved,) = torch.autograd.grad(outputs, layer.weight, slopes)
    met = meetings(layer, size)
    system = design(slopes.flatten(2), met, size[0] * inputs[0, 0, 0].numel())
    by_design = system @ inputs.transpose(0, 1).flatten(1).T
    assert torch.allclose(by_design, moved.flatten(2).transpose(1, 2).flatten(0, 1))
    by_patches = torch.einsum("nop,nckp->ock", slopes.flatten(2), patches(inputs, met))
    assert torch.allclose(by_patches, moved.flatten(2))


def test_patches_are_those_of_torch() -> None:
    inputs = torch.randn(2, 3, 6, 5, generator=torch.Generator().manual_seed(1))
    layer = nn.Conv2d(3, 1, 3, stride=2, padding=1)
    own = patches(inputs, meetings(layer, (6, 5)))
    assert torch.equal(own.flatten(1, 2), unfold(inputs, 3, padding=1, stride=2))


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(4, 4, 3, groups=2),
        nn.Conv2d(1, 1, 3, padding=1, padding_mode="reflect"),
        nn.Conv2d(1, 1, 3, padding="same"),
    ],
    ids=["groups", "reflection", "same"],
)
def test_other_convolutions_are_refused(layer: Convolution) -> None:
    with pytest.raises(ValueError, match="one group"):
        meetings(layer, (8, 8))
