from __future__ import annotations

import pytest
import torch
from torch import nn

from flpriv.attacks.inversion.inverses import INVERSES
from flpriv.attacks.inversion.linear_systems import Equations, solve


def equations(
    layer: nn.Module, shape: tuple[int, ...], *, known: float = 1.0, silent: bool = False
) -> tuple[torch.Tensor, Equations]:
    """The equations of random inputs, and these; a share of the outputs is known, and the loss may not depend on any."""
    rng = torch.Generator().manual_seed(0)
    inputs = torch.randn(shape, generator=rng).double()
    layer = layer.double()
    weight = layer.get_parameter("weight").detach()
    bias = dict(layer.named_parameters()).get("bias")
    out = layer(inputs[None])[0].detach()
    out = out - bias.detach().view(-1, *[1] * (out.dim() - 1)) if bias is not None else out
    slopes = torch.randn(out.shape, generator=rng).double() * (not silent)
    with torch.enable_grad():
        (moved,) = torch.autograd.grad((layer(inputs[None])[0] * slopes).sum(), layer.get_parameter("weight"))
    trust = (torch.rand(out.shape, generator=rng) < known).double() * torch.rand(out.shape, generator=rng).double()
    wrong = torch.where(trust > 0, out, 99.0)
    return inputs, Equations(layer=layer, weight=weight, shape=shape, outputs=wrong, trust=trust, slopes=slopes, moved=moved)


@pytest.mark.parametrize(
    ("layer", "shape", "known"),
    [
        (nn.Conv2d(1, 8, 3, padding=1), (1, 9, 10), 1.0),
        (nn.Conv2d(1, 8, 3, padding=1), (1, 9, 10), 0.4),
        (nn.Conv2d(2, 12, 5, stride=2, padding=2, bias=False), (2, 8, 8), 1.0),
        (nn.Conv2d(8, 8, 5, stride=2, padding=2), (8, 8, 8), 0.5),
        (nn.Conv2d(4, 8, 3, padding=1, dilation=1, groups=2), (4, 6, 6), 1.0),
        (nn.Conv2d(1, 6, 3, padding=1, padding_mode="circular"), (1, 8, 8), 1.0),
        (nn.Conv3d(1, 6, 3, padding=1), (1, 5, 6, 7), 0.7),
        (nn.Conv1d(2, 9, 3), (2, 20), 1.0),
    ],
)
def test_inputs_are_solved_for(layer: nn.Module, shape: tuple[int, ...], known: float) -> None:
    inputs, system = equations(layer, shape, known=known)
    found = solve(system)
    assert found is not None
    assert torch.allclose(found, inputs, atol=1e-6)


def test_the_gradient_alone_may_suffice() -> None:
    """No output is known, and the weights outnumber the inputs."""
    inputs, system = equations(nn.Conv2d(4, 16, 5, padding=2), (4, 6, 6), known=0.0)
    found = solve(system)
    assert found is not None
    assert torch.allclose(found, inputs, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "shape", "known", "silent"),
    [
        (nn.Conv2d(4, 2, 3, stride=2, padding=1), (4, 12, 12), 1.0, False),
        (nn.Conv2d(1, 1, 2, stride=3), (1, 9, 9), 1.0, False),
        (nn.Conv2d(4, 16, 5, padding=2), (4, 6, 6), 0.0, True),
    ],
    ids=["too few equations", "pixels that no output sees", "nothing known"],
)
def test_open_inputs_are_not_made_up(layer: nn.Module, shape: tuple[int, ...], known: float, silent: bool) -> None:
    assert solve(equations(layer, shape, known=known, silent=silent)[1]) is None


@pytest.mark.parametrize("kind", INVERSES)
def test_activations_run_backwards(kind: type[nn.Module]) -> None:
    inputs = torch.linspace(-4, 4, 101).double()
    found, known = INVERSES[kind](kind(), kind()(inputs))
    assert torch.allclose(found[known], inputs[known], atol=1e-6)
    assert bool(known[inputs > 0.01].all())
    assert bool(known.all()) != (kind is nn.ReLU)


def test_a_leaky_relu_without_leak_is_a_relu() -> None:
    inputs = torch.linspace(-1, 1, 21).double()
    _, known = INVERSES[nn.LeakyReLU](nn.LeakyReLU(0), nn.LeakyReLU(0)(inputs))
    assert torch.equal(known, inputs > 0)
