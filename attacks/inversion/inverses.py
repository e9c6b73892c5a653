"""Activations backwards: what went in, where what came out tells it."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn


def _relu(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    known = out > 1e-5 * out.abs().amax()
    return torch.where(known, out, -1.0), known


def _leaky_relu(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    slope = module.negative_slope
    assert isinstance(slope, int | float)
    return torch.where(out < 0, out / (slope or 1), out), (out > 0) | (slope != 0)


def _elu(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    alpha = module.alpha
    assert isinstance(alpha, int | float)
    return torch.where(out < 0, (out / alpha).clamp_min(-1 + 1e-12).log1p(), out), out > -alpha


def _softplus(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    beta = module.beta
    assert isinstance(beta, int | float)
    return out + (-torch.expm1(-beta * out.clamp_min(1e-12))).log() / beta, out > 0


def _sigmoid(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    return out.clamp(1e-12, 1 - 1e-12).logit(), (out > 0) & (out < 1)


def _tanh(module: nn.Module, out: Tensor) -> tuple[Tensor, Tensor]:
    return out.clamp(-1 + 1e-12, 1 - 1e-12).atanh(), out.abs() < 1


INVERSES: Mapping[type[nn.Module], Callable[[nn.Module, Tensor], tuple[Tensor, Tensor]]] = {
    nn.ReLU: _relu,
    nn.LeakyReLU: _leaky_relu,
    nn.ELU: _elu,
    nn.Softplus: _softplus,
    nn.Sigmoid: _sigmoid,
    nn.Tanh: _tanh,
}
"""From the outputs of an activation to its inputs and whether these are known."""
