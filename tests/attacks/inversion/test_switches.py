from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from flpriv.attacks.inversion.patches import meetings, patches
from flpriv.attacks.inversion.switches import corrected, discover, least_squares


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A convolution under a ReLU, and what its gradient is made of."""

    switches: Tensor
    slopes: Tensor
    moved: Tensor
    met: Tensor
    inputs: int


def layer(images: int, side: int, *, outputs: int = 96, channels: int = 8, pooled: bool = True, noise: float = 0.0) -> Layer:
    rng = torch.Generator().manual_seed(images)
    conv = nn.Conv2d(channels, outputs, 3, padding=1)
    met = meetings(conv, (side, side))
    inputs = torch.randn(images, channels, side, side, generator=rng, dtype=torch.float64).relu()
    level = torch.randn(images, outputs, 1 if pooled else side * side, generator=rng, dtype=torch.float64)
    slopes = level.expand(images, outputs, side * side)
    switches = (torch.rand(images, outputs, side * side, generator=rng) < 0.6).double()
    moved = torch.einsum("nop,nckp->ock", slopes * switches, patches(inputs, met))
    moved = moved + noise * moved.square().mean().sqrt() * torch.randn(moved.shape, generator=rng, dtype=torch.float64)
    return Layer(switches=switches, slopes=slopes, moved=moved, met=met, inputs=side * side)


@pytest.mark.parametrize(("images", "side"), [(1, 2), (1, 3), (1, 4), (3, 2)])
def test_switches_under_global_pooling_are_found(images: int, side: int) -> None:
    one = layer(images, side, noise=1e-6)
    found = discover(one.slopes, one.moved, one.met, inputs=one.inputs, bits=16)
    assert found is not None and torch.equal(found, one.switches)


def test_what_cannot_be_found_is_not_claimed() -> None:
    one = layer(2, 3)
    assert discover(one.slopes, one.moved, one.met, inputs=one.inputs, bits=17) is None, "a rank of 18"
    apart = layer(1, 2, pooled=False)
    assert discover(apart.slopes, apart.moved, apart.met, inputs=apart.inputs, bits=16) is None, "slopes that differ"
    noisy = layer(1, 2, noise=0.5)
    assert discover(noisy.slopes, noisy.moved, noisy.met, inputs=noisy.inputs, bits=16) is None, "noise"
    other = layer(1, 2)
    assert discover(other.slopes * torch.rand(1, 96, 1), other.moved, other.met, inputs=4, bits=16) is None, "other slopes"


@pytest.mark.parametrize("wrong", [1, 5])
def test_wrong_switches_are_put_right(wrong: int) -> None:
    one = layer(2, 4, pooled=False, noise=1e-6)
    spoilt = one.switches.clone()
    places = torch.randperm(spoilt.numel(), generator=torch.Generator().manual_seed(3))[:wrong]
    spoilt.view(-1)[places] = 1 - spoilt.view(-1)[places]
    assert torch.equal(corrected(spoilt, one.slopes, one.moved, one.met, inputs=one.inputs), one.switches)
    assert torch.equal(corrected(one.switches, one.slopes, one.moved, one.met, inputs=one.inputs), one.switches)


def test_switches_stay_where_the_equations_are_too_few() -> None:
    one = layer(2, 6, outputs=4, pooled=False)
    spoilt = 1 - one.switches
    assert torch.equal(corrected(spoilt, one.slopes, one.moved, one.met, inputs=one.inputs), spoilt)


def test_open_systems_have_no_solution() -> None:
    rng = torch.Generator().manual_seed(0)
    system, x = torch.randn(20, 6, generator=rng, dtype=torch.float64), torch.randn(6, 3, generator=rng, dtype=torch.float64)
    solved = least_squares(system, system @ x)
    assert solved is not None and torch.allclose(solved, x)
    assert least_squares(system[:5], (system @ x)[:5]) is None
    system[:, 0] = system[:, 1]
    assert least_squares(system, system @ x) is None
