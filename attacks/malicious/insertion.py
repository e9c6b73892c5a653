"""Putting a module of the operator's own before a model or a layer of it; the honest keys stay as they are."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from flpriv.errors import ScenarioError, near
from flpriv.state import State


def insert(model: nn.Module, block: nn.Module, *, name: str, before: str = "") -> nn.Module:
    """``model`` with ``block`` registered as ``name`` and run on its input, or on that of its submodule ``before``."""
    place, at = host(model, before), model.get_submodule(before)
    model.get_submodule(place).add_module(name, block)
    at.register_forward_pre_hook(partial(_through, name=f"{place}.{name}".removeprefix(f"{before}.").lstrip(".")), prepend=True)
    return model


def received(model: nn.Module, images: Tensor, before: str) -> Tensor:
    """What the submodule ``before`` of ``model`` is handed when the model looks at ``images``, ``(N, *shape)``.

    Raises:
        ScenarioError: if there is no such submodule, or no such tensor reaches it.
    """
    known = dict(model.named_modules())
    if before not in known:
        raise ScenarioError(f"before = {before!r}: the model has no such layer{near(before, known)}")
    hook = known[before].register_forward_pre_hook(_stop)
    try:
        model(images)
    except _Reached as reached:
        return reached.tensor
    finally:
        hook.remove()
    raise ScenarioError(f"before = {before!r}: the model does not use this layer")


class _Reached(Exception):
    """Ends a forward pass where it is wanted no further."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _stop(_: nn.Module, args: tuple[Tensor, ...]) -> None:
    raise _Reached(args[0])


def host(model: nn.Module, before: str = "") -> str:
    """The name of the module that takes a block in: ``before``, or within it the first that is no sequence of layers."""
    name, inner = before, model.get_submodule(before)
    while isinstance(inner, nn.Sequential):
        child, inner = next(inner.named_children())
        name = f"{name}.{child}".lstrip(".")
    return name


def prefix(sent: State, name: str) -> str | None:
    """Where the block called ``name`` with its dense layer ``bins`` stands in a state; ``None`` if it is not there."""
    return next((key.removesuffix(".bins.weight") for key in sent if f".{key}".endswith(f".{name}.bins.weight")), None)


def _through(model: nn.Module, args: tuple[Tensor, ...], *, name: str) -> tuple[Tensor, ...]:
    return model.get_submodule(name)(args[0]), *args[1:]
