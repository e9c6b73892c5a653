"""What every plugin must be, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

import torch

from flpriv.errors import ScenarioError
from flpriv.registry import validate

if TYPE_CHECKING:
    from collections.abc import Iterator


def require(condition: object, text: str) -> None:
    """Raise unless ``condition`` holds.

    Raises:
        AssertionError: saying ``text``.
    """
    if not condition:
        raise AssertionError(text)


def check_plugin(plugin: object, *, facts: Sequence[str]) -> str:
    """A frozen keyword-only dataclass with a name, documented options and the class attributes ``facts``; returns its name.

    Raises:
        AssertionError: saying what is missing.
    """
    cls = type(plugin)
    name = getattr(cls, "name", "")
    require(isinstance(name, str) and name, f"{cls.__name__}: set name, as scenarios will call it")
    require(is_dataclass(cls), f"{name}: make it a dataclass")
    parameters = cls.__dataclass_params__  # type: ignore[attr-defined]
    require(parameters.frozen, f"{name}: make the dataclass frozen")
    text = cls.__dict__.get("__doc__") or ""
    require(text and not text.startswith(f"{cls.__name__}("), f"{name}: say in a docstring what it does")
    text = "\n".join(base.__dict__.get("__doc__") or "" for base in cls.__mro__ if is_dataclass(base))
    for field in fields(cls):  # type: ignore[arg-type]
        require(field.kw_only, f"{name}: make option {field.name!r} keyword-only")
        require(f"{field.name}:" in text, f"{name}: explain option {field.name!r} in the docstring's Args")
    for fact in facts:
        require(getattr(cls, fact, None), f"{name}: set the class attribute {fact!r}")
    try:
        validate(cls, {"no_such_option": 1}, where=name)
    except ScenarioError:
        return name
    raise AssertionError(f"{name}: a misspelt option must be refused: keep pydantic's extra='forbid'")


@contextmanager
def global_seed(seed: int) -> Iterator[None]:
    """Set torch's global random state within the block and put the old one back; a plugin that uses it gives itself away."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def same(one: Any, two: Any) -> bool:
    """Whether two values are equal, tensors bit by bit with NaN equal to itself."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        return one.shape == two.shape and one.dtype == two.dtype and torch.equal(torch.nan_to_num(one), torch.nan_to_num(two))
    return type(one) is type(two) and bool(one == two)
