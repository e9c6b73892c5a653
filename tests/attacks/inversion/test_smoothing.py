from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.func import functional_call

from flpriv.attacks.inversion.smoothing import Rounded, kinks, smoothed
from flpriv.task import Task


@pytest.mark.parametrize("slope", [0.0, 0.1])
@pytest.mark.parametrize("sharpness", [3.0, 30.0])
def test_the_error_is_largest_at_the_kink_and_has_no_jump(sharpness: float, slope: float) -> None:
    value = torch.linspace(-5, 5, 1001, dtype=torch.float64, requires_grad=True)
    rounded = Rounded(sharpness=sharpness, slope=slope)(value)
    error = (rounded - nn.functional.leaky_relu(value, slope)).detach()
    assert 0 < float(error.max()) == pytest.approx((1 - slope) / (2 * sharpness))
    assert int(error.argmax()) == 500
    (rise,) = torch.autograd.grad(rounded.sum(), value)
    assert bool((rise.diff() >= 0).all()) and float(rise.diff().max()) < 0.01 * sharpness
    assert float(rise[0]) == pytest.approx(slope, abs=0.01) and float(rise[-1]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("model", ["cnn", "resnet18", "densenet121"])
def test_a_copy_comes_ever_nearer_to_the_model(model: str) -> None:
    task = Task(modality="xray", shape=(1, 32, 32), classes=("a", "b"), model=model, mean=0.5, std=0.25)
    real = task.build().eval().requires_grad_(False)
    images = torch.rand((2, 1, 32, 32), generator=torch.Generator().manual_seed(0))
    state = dict(real.state_dict())
    apart = []
    for sharpness in (10.0, 100.0, 1000.0):
        copy = smoothed(real, sharpness)
        assert copy is not real and kinks(copy) == 0 < kinks(real)
        assert copy.state_dict().keys() == state.keys()
        apart.append(float((functional_call(copy, state, (images,)) - real(images)).norm() / real(images).norm()))
    assert apart[0] > 3 * apart[1] > 9 * apart[2] and apart[2] < 0.05
    assert smoothed(real, math.inf) is real


def test_a_smooth_model_stays_as_it_is() -> None:
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="lenet")
    model = task.build()
    images = torch.rand(1, 1, 16, 16)
    assert kinks(model) == 0
    assert torch.equal(smoothed(model, 10.0)(images), model(images))
