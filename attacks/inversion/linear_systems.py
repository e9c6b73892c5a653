"""What a convolution put out and the gradient of its weights, as equations for what it took in."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

_ROWS = 512


@dataclass(frozen=True, kw_only=True)
class Equations:
    """Everything that is known of the inputs of a convolution without its bias. All tensors are float64.

    Args:
        layer: the convolution.
        weight: as sent.
        shape: of its inputs.
        outputs: what came out.
        trust: how much an error of each output counts, 0 where it is not known.
        slopes: gradient of the loss in the outputs.
        moved: gradient of the loss in the weights.
    """

    layer: nn.Module
    weight: Tensor
    shape: tuple[int, ...]
    outputs: Tensor
    trust: Tensor
    slopes: Tensor
    moved: Tensor

    def forward(self, inputs: Tensor, weight: Tensor) -> Tensor:
        """What comes out, linear in both."""
        parameters = {"weight": weight}
        if getattr(self.layer, "bias", None) is not None:
            parameters["bias"] = weight.new_zeros(len(weight))
        out: Tensor = functional_call(self.layer, parameters, (inputs[None],))
        return out[0]

    def back(self, outputs: Tensor, weight: Tensor) -> Tensor:
        """The gradient of ``<outputs, forward(x, weight)>`` in x, linear in both; with ``slopes``, that of the loss."""
        inputs: Tensor = vjp(lambda inputs: self.forward(inputs, weight), outputs.new_zeros(self.shape))[1](outputs)[0]
        return inputs

    def gradient(self, inputs: Tensor) -> Tensor:
        """The gradient of the loss in the weights, were these the inputs."""
        weight: Tensor = vjp(lambda weight: self.forward(inputs, weight), self.weight)[1](self.slopes)[0]
        return weight


def solve(equations: Equations) -> Tensor | None:
    """The inputs nearest to both kinds of equations; ``None`` where these leave some input open."""
    e = equations
    by_output = _normal(e.trust, lambda unit: e.back(unit, e.weight), unknowns=prod(e.shape))
    by_weight = _normal(torch.ones_like(e.weight), lambda unit: e.back(e.slopes, unit), unknowns=prod(e.shape))
    scale = (
        float(by_output.trace() / by_weight.trace().clamp_min(1e-300)) * e.weight.numel() / max(int(e.trust.count_nonzero()), 1)
    )
    if not 0 < scale < float("inf"):
        scale = 1.0
    factor, failed = torch.linalg.cholesky_ex(by_output + scale * by_weight)
    pivots = factor.diagonal()
    if int(failed) or not float(pivots.min()) > 1e-7 * float(pivots.max()):
        return None
    inputs = e.outputs.new_zeros(e.shape)
    for _ in range(3):
        missed = e.back(e.trust.square() * (e.outputs - e.forward(inputs, e.weight)), e.weight)
        missed = missed + scale * e.back(e.slopes, e.moved - e.gradient(inputs))
        inputs = inputs + torch.cholesky_solve(missed.reshape(-1, 1), factor).view(e.shape)
    return inputs


def _normal(trust: Tensor, pull: Callable[[Tensor], Tensor], *, unknowns: int) -> Tensor:
    """The sum of the outer products of the equations times ``trust``²; each is ``pull`` of a unit vector in the shape of that."""
    total = torch.zeros((unknowns, unknowns), dtype=torch.float64)
    known = trust.flatten().nonzero().flatten()
    for places in torch.split(known, _ROWS) if len(known) else ():
        units = torch.zeros((len(places), trust.numel()), dtype=torch.float64)
        units[torch.arange(len(places)), places] = trust.flatten()[places]
        rows = vmap(pull)(units.view(-1, *trust.shape)).flatten(1)
        total.addmm_(rows.T, rows)
    return total
