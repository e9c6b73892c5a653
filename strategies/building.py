"""A strategy by name: Flower's own, a registered one, or an import path."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy

from flpriv.errors import ScenarioError, near
from flpriv.registry import Plugin, plugins


def build_strategy(name: str, options: Mapping[str, Any], *, sites: int | None = None, files: Iterable[Path] = ()) -> Strategy:
    """The strategy called ``name`` with ``options`` for its constructor.

    Where the constructor takes Flower's counts (``min_train_nodes``, ``min_evaluate_nodes``, ``min_available_nodes``) and
    ``sites`` is given, those not among the options become what the fractions ask for, so that no round waits for sites there are
    not. A strategy that wraps another takes it as option ``strategy``: a name, or a table with ``name`` and its options.

    Args:
        name: class name of a strategy of Flower, registered name, or ``"package.module:Class"``.
        options: keyword arguments of the constructor.
        sites: how many sites the federation has.
        files: Python files with further strategies.

    Raises:
        ScenarioError: for an unknown name or option with the nearest known one, a value of the wrong type or out of range, or
            counts larger than ``sites``.
    """
    cls, where = _find(name, files), f"strategy {name!r}"
    known = inspect.signature(cls).parameters
    open_ended = any(one.kind is one.VAR_KEYWORD for one in known.values())
    for option in options:
        if option not in known and not open_ended:
            raise ScenarioError(f"{where}: unknown option {option!r}{near(option, known)}")
    given = {option: _checked(cls, option, value, where) for option, value in options.items()}
    if "strategy" in known:
        given["strategy"] = _inner(given.get("strategy", "FedAvg"), sites, files)
    if sites is not None:
        given |= {option: count for option, count in _counts(given, sites, where).items() if option in known}
    for option, one in known.items():
        if option not in given and one.default is one.empty and one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
            raise ScenarioError(f"{where}: option {option!r} is required; give it in [federation.options]")
    try:
        built = cls(**given)
    except (TypeError, ValueError) as error:
        raise ScenarioError(f"{where}: {error}") from error
    if not isinstance(built, Strategy):
        raise ScenarioError(f"{where} is not a flwr.serverapp.strategy.Strategy")
    return built


def _find(name: str, files: Iterable[Path]) -> type[Any]:
    if ":" in name:
        return Plugin(kind="strategies", name=name, target=name).load()
    own: dict[str, type[Any]] = {
        key: value
        for key, value in vars(flower).items()
        if isinstance(value, type) and issubclass(value, Strategy) and not inspect.isabstract(value)
    }
    registered = plugins("strategies", files=files)
    if name in registered:
        return registered[name].load()
    if name not in own:
        raise ScenarioError(f"federation.strategy: unknown strategy {name!r}{near(name, [*own, *registered])}")
    return own[name]


def _inner(given: Any, sites: int | None, files: Iterable[Path]) -> Strategy:
    table = {"name": given} if isinstance(given, str) else dict(given)
    return build_strategy(str(table.pop("name", "FedAvg")), table, sites=sites, files=files)


def _counts(given: Mapping[str, Any], sites: int, where: str) -> dict[str, int]:
    """The counts a federation of ``sites`` can meet, those given included."""
    defaults = {
        "min_available_nodes": sites,
        "min_train_nodes": _share(given.get("fraction_train", 1.0), sites),
        "min_evaluate_nodes": _share(given.get("fraction_evaluate", 1.0), sites),
    }
    for option in defaults.keys() & given.keys():
        if given[option] > sites:
            raise ScenarioError(f"{where}: {option} = {given[option]}, but there are {sites} sites")
    return {option: given.get(option, count) for option, count in defaults.items()}


def _share(fraction: float, sites: int) -> int:
    return max(1, int(sites * fraction)) if fraction > 0 else 0


def _checked(cls: type[Any], option: str, value: Any, where: str) -> Any:
    """``value`` as the constructor's annotation of ``option`` has it, where that is a plain type."""
    from pydantic import TypeAdapter, ValidationError

    try:
        wanted = typing.get_type_hints(cls.__init__).get(option)
    except (NameError, TypeError):
        return value
    if wanted not in (int, float, bool, str):
        return value
    try:
        return TypeAdapter(wanted).validate_python(value, strict=wanted is not float)
    except ValidationError as error:
        raise ScenarioError(f"{where}: {option} = {value!r}: {error.errors()[0]['msg']}") from None
