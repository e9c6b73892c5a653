"""Model states as dictionaries of tensors: which entries are parameters, and arithmetic on those alone."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from flpriv.errors import UpdateError

State = Mapping[str, Tensor]
"""Named tensors of a model, as in ``nn.Module.state_dict()``."""

_BUFFERS = ("running_mean", "running_var", "num_batches_tracked")


def is_parameter(key: str, value: Tensor) -> bool:
    """Whether update arithmetic applies: floating, and neither a running statistic nor a counter."""
    return value.is_floating_point() and key.rsplit(".", 1)[-1] not in _BUFFERS


def parameters(state: State) -> dict[str, Tensor]:
    """The entries of ``state`` that are parameters."""
    return {key: value for key, value in state.items() if is_parameter(key, value)}


def difference(after: State, before: State) -> dict[str, Tensor]:
    """``after - before`` over the parameters of ``before``, in the wider of float32 and their own type."""
    return {key: _wide(after[key]) - _wide(value) for key, value in before.items() if is_parameter(key, value)}


def add(state: State, update: State) -> dict[str, Tensor]:
    """``state`` with ``update`` added where it has an entry, dtypes kept; everything else as it is."""
    return {key: (_wide(value) + update[key]).to(value.dtype) if key in update else value for key, value in state.items()}


def norm(update: State) -> Tensor:
    """Euclidean norm over all entries together, a float64 scalar (0 for an empty update)."""
    squares = [value.double().square().sum() for value in update.values()]
    return torch.stack(squares).sum().sqrt() if squares else torch.zeros((), dtype=torch.float64)


def fingerprint(state: State) -> str:
    """16 hexadecimal digits that depend on every entry's name, dtype, shape and values."""
    digest = hashlib.sha256()
    for key, value in sorted(state.items()):
        plain = value.detach().cpu().contiguous()
        digest.update(f"{key}\0{plain.dtype}\0{tuple(plain.shape)}\0".encode())
        digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def check_finite(state: State, *, who: str) -> None:
    """Raise if any floating entry holds a NaN or an infinity.

    Raises:
        UpdateError: naming ``who`` and the first offending layer.
    """
    for key, value in state.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise UpdateError(f"{who}: layer {key!r} holds NaN or infinite values; lower the learning rate or clip the update")


def check_like(state: State, like: State, *, who: str) -> None:
    """Raise unless ``state`` has the keys and shapes of ``like``.

    Raises:
        UpdateError: naming ``who`` and the first layer that is missing, unknown or of another shape.
    """
    for key in _first(like.keys() - state.keys()):
        raise UpdateError(f"{who}: layer {key!r} is missing")
    for key in _first(state.keys() - like.keys()):
        raise UpdateError(f"{who}: layer {key!r} is not part of the model")
    for key, value in like.items():
        if state[key].shape != value.shape:
            raise UpdateError(f"{who}: layer {key!r} has shape {tuple(state[key].shape)}, expected {tuple(value.shape)}")


def _first(keys: Iterable[str]) -> list[str]:
    return sorted(keys)[:1]


def _wide(value: Tensor) -> Tensor:
    return value.float() if value.dtype in (torch.float16, torch.bfloat16) else value
