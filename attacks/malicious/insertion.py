"""Putting a module of the operator's own before a model, under a name of its own; the honest keys stay as they are."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flpriv.state import State


def insert(model: nn.Module, block: nn.Module, *, name: str) -> nn.Module:
    """``model`` with ``block`` registered as ``name`` and run on its input."""
    place = host(model)
    model.get_submodule(place).add_module(name, block)
    model.register_forward_pre_hook(partial(_through, name=f"{place}.{name}".lstrip(".")), prepend=True)
    return model


def host(model: nn.Module) -> str:
    """The name of the module that takes a block in: the root, or within it the first that is no sequence of layers."""
    name, inner = "", model
    while isinstance(inner, nn.Sequential):
        child, inner = next(inner.named_children())
        name = f"{name}.{child}".lstrip(".")
    return name


def prefix(sent: State, name: str) -> str | None:
    """Where the block called ``name`` with its dense layer ``bins`` stands in a state; ``None`` if it is not there."""
    return next((key.removesuffix(".bins.weight") for key in sent if f".{key}".endswith(f".{name}.bins.weight")), None)


def _through(model: nn.Module, args: tuple[Tensor, ...], *, name: str) -> tuple[Tensor, ...]:
    return model.get_submodule(name)(args[0]), *args[1:]
