"""Gradients of single records, flattened over all parameters, and images crafted for theirs to stand apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional

from flpriv.records import Records
from flpriv.state import State, parameters


def flat(state: State) -> Tensor:
    """The parameters of a state one after another, ``(d,)`` float32 on the CPU."""
    return torch.cat([value.detach().reshape(-1).float().cpu() for value in parameters(state).values()])


def gradients(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Gradient of each record's cross-entropy, ``(N, d)`` in the order of :func:`flat`, in the mode the model is in; images may
    require a gradient.
    """
    state = model.state_dict()
    weights = {name: state[name].detach() for name in parameters(state)}
    rest = {name: value for name, value in state.items() if name not in weights}

    def loss(weights: Mapping[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return functional.cross_entropy(functional_call(model, ({**weights, **rest},), (image[None],)), label[None])

    found = vmap(grad(loss), in_dims=(None, 0, 0), randomness="different")(weights, images, labels)
    return torch.cat([found[name].flatten(1) for name in weights], 1)


def along(model: nn.Module, records: Records, update: Tensor, *, chunk: int = 16) -> Tensor:
    """Length of ``-update`` along the direction of each record's gradient, ``(N,)`` float64; 0 where the gradient is zero.

    Args:
        model: where the gradients are taken.
        records: N of them.
        update: ``(d,)``, in the order of :func:`flat`.
        chunk: records whose gradients are held at once.
    """
    device = next(model.parameters()).device
    found = []
    for images, labels in _split(records, chunk):
        rows = gradients(model, images.to(device), labels.to(device)).detach().cpu()
        found.append((rows @ -update).double() / rows.double().norm(dim=1).clamp_min(1e-30))
    return torch.cat(found)


def craft(
    model: nn.Module, start: Records, others: Records, *, norm: float, steps: int, lr: float = 0.02, chunk: int = 16
) -> Records:
    """Images whose gradients are at least ``norm`` long and stand across those of ``others``: CANIFE's objective.

    ``mean_j <u_j, g / |g|>² + max(0, 1 - |g| / norm)²`` with ``u_j`` the directions of the others' gradients, by Adam over pixels
    in [0, 1]; labels stay those of ``start``.
    """
    device = next(model.parameters()).device
    with torch.no_grad():
        rows = [gradients(model, images.to(device), labels.to(device)) for images, labels in _split(others, chunk)]
    directions = functional.normalize(torch.cat(rows).detach(), dim=1)
    done = []
    for images, labels in _split(start, chunk):
        pixels = images.to(device).clone().requires_grad_(True)
        optimizer = torch.optim.Adam([pixels], lr=lr)
        for _ in range(steps):
            optimizer.zero_grad()
            own = gradients(model, pixels, labels.to(device))
            across = (functional.normalize(own, dim=1) @ directions.T).square().mean(1)
            short = (1 - own.norm(dim=1) / norm).clamp_min(0).square()
            torch.autograd.backward((across + short).sum())
            optimizer.step()
            with torch.no_grad():
                pixels.clamp_(0, 1)
        done.append(pixels.detach().cpu())
    return Records(images=torch.cat(done), labels=start.labels)


def _split(records: Records, chunk: int) -> Sequence[tuple[Tensor, Tensor]]:
    return list(zip(torch.split(records.images, chunk), torch.split(records.labels, chunk), strict=True))
