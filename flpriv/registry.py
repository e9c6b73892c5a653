"""Names to plugins: the families' own folders, entry points of installed packages, and files a scenario names.

Listing reads source text, never imports it: ``flpriv list`` stays fast and cannot run foreign code.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast

from flpriv.errors import ScenarioError, near

if TYPE_CHECKING:
    from torch import nn

    from flpriv.task import Task

T = TypeVar("T")
Kind = Literal["attacks", "defenses", "strategies", "sites", "models"]

_FOLDERS: Mapping[Kind, tuple[str, str]] = {
    "attacks": ("flpriv.attacks", "Attack"),
    "defenses": ("flpriv.defenses", "Defense"),
    "strategies": ("flpriv.strategies", "Strategy"),
    "sites": ("flpriv.clients.sites", "Sites"),
    "models": ("flpriv.clients.models", "Model"),
}


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """Where a plugin is, without importing it.

    Args:
        kind: its family.
        name: as in scenarios.
        target: ``"package.module:Class"``, or ``"/path/file.py:Class"``.
        summary: first line of its docstring.
        paper: the paper it follows, where stated.
    """

    kind: Kind
    name: str
    target: str
    summary: str = ""
    paper: str = ""

    def load(self) -> type[Any]:
        """Import the class.

        Raises:
            ScenarioError: if the import fails, with the reason.
        """
        return cast(type[Any], _import(self.target))


def plugins(kind: Kind, *, files: Iterable[Path] = ()) -> dict[str, Plugin]:
    """All plugins of a kind by name: ours, installed entry points, and those in ``files``.

    Raises:
        ScenarioError: if two of them share a name.
    """
    found: dict[str, Plugin] = {}
    for plugin in [*_own(kind), *_installed(kind), *(p for file in files for p in _in_file(kind, Path(file)))]:
        if found.setdefault(plugin.name, plugin) != plugin:
            raise ScenarioError(f"two {kind} are called {plugin.name!r}: {found[plugin.name].target} and {plugin.target}")
    return dict(sorted(found.items()))


def flower_strategies() -> tuple[Plugin, ...]:
    """Flower's own strategies, which a scenario names by class; their source is read, not imported."""
    spec = importlib.util.find_spec("flwr")
    folders = spec.submodule_search_locations or [] if spec else []
    files = [file for folder in folders for file in sorted((Path(folder) / "serverapp" / "strategy").glob("[!_]*.py"))]
    nodes = [
        node for file in files for node in ast.parse(file.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)
    ]
    return tuple(
        Plugin(
            kind="strategies",
            name=node.name,
            target=f"flwr.serverapp.strategy:{node.name}",
            summary=(ast.get_docstring(node) or "").split("\n", 1)[0],
        )
        for node in nodes
        if node.bases and not node.name.endswith("Base") and node.name not in ("Strategy", "FedOpt")
    )


def find(kind: Kind, name: str, *, files: Iterable[Path] = ()) -> type[Any]:
    """The class of the plugin called ``name``.

    Raises:
        ScenarioError: if there is none, with the nearest name.
    """
    known = plugins(kind, files=files)
    if name not in known:
        raise ScenarioError(f"unknown {_SINGULAR[kind]} {name!r}{near(name, known)}")
    return known[name].load()


def create(kind: Kind, name: str, options: Mapping[str, Any], *, files: Iterable[Path] = ()) -> Any:
    """The plugin called ``name`` with its options checked against its fields.

    Raises:
        ScenarioError: for an unknown name or option, or a value of the wrong type, naming it.
    """
    return validate(find(kind, name, files=files), options, where=f"{_SINGULAR[kind]} {name!r}")


def validate(cls: type[T], options: Mapping[str, Any], *, where: str) -> T:
    """An instance of dataclass ``cls`` from plain ``options``, checked by pydantic.

    Raises:
        ScenarioError: naming ``where`` and the option, with the nearest known name for a misspelt one.
    """
    from dataclasses import fields, is_dataclass

    from pydantic import TypeAdapter, ValidationError

    try:
        return TypeAdapter(cls).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"]) or "options"
        if first["type"] == "unexpected_keyword_argument":
            known = [field.name for field in fields(cls)] if is_dataclass(cls) else []
            raise ScenarioError(f"{where}: unknown option {name!r}{near(name, known)}") from None
        raise ScenarioError(f"{where}: {name} = {first.get('input')!r}: {first['msg']}") from None


def build_model(task: Task) -> nn.Module:
    """The model a task names, by registered name or by import path ``"package.module:factory"``.

    A registered model is a frozen dataclass with ``build(shape, classes) -> nn.Module``; a factory is called with the task's
    options as keyword arguments.

    Raises:
        ScenarioError: for an unknown name, a factory that cannot be imported, or wrong options.
    """
    if ":" in task.model:
        factory = _import(task.model)
        try:
            model: nn.Module = factory(**task.options)
        except TypeError as error:
            raise ScenarioError(f"model {task.model!r}: {error}") from error
        return model
    model_of = create("models", task.model, task.options, files=map(Path, task.plugins))
    built: nn.Module = model_of.build(task.shape, len(task.classes))
    return built


_SINGULAR: Mapping[Kind, str] = {
    "attacks": "attack",
    "defenses": "defense",
    "strategies": "strategy",
    "sites": "source of sites",
    "models": "model",
}


def _own(kind: Kind) -> Iterator[Plugin]:
    package, base = _FOLDERS[kind]
    spec = importlib.util.find_spec(package)
    for folder in spec.submodule_search_locations or [] if spec else []:
        root = Path(folder)
        for file in sorted(root.rglob("*.py")):
            module = ".".join((package, *file.relative_to(root).with_suffix("").parts))
            yield from _scan(kind, base, file, module.removesuffix(".__init__"))


def _in_file(kind: Kind, file: Path) -> Iterator[Plugin]:
    if not file.is_file():
        raise ScenarioError(f"plugins: no such file: {file}")
    yield from _scan(kind, _FOLDERS[kind][1], file, str(file.resolve()))


@lru_cache
def _installed(kind: Kind) -> tuple[Plugin, ...]:
    return tuple(
        Plugin(kind=kind, name=point.name, target=point.value, summary=f"from {point.dist.name}" if point.dist else "")
        for point in entry_points(group=f"flpriv.{kind}")
    )


@lru_cache
def _scan(kind: Kind, base: str, file: Path, module: str) -> tuple[Plugin, ...]:
    """Classes that derive from a base whose name ends in ``base`` and set a ``name``."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), filename=str(file))
    except SyntaxError as error:
        raise ScenarioError(f"plugins: {file}: line {error.lineno}: {error.msg}") from error
    found = []
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and any(_base_name(b).endswith(base) for b in node.bases):
            texts = _texts(node)
            if "name" in texts:
                summary = (ast.get_docstring(node) or "").split("\n", 1)[0]
                found.append(
                    Plugin(
                        kind=kind,
                        name=texts["name"],
                        target=f"{module}:{node.name}",
                        summary=summary,
                        paper=texts.get("paper", ""),
                    )
                )
    return tuple(found)


def _base_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript):
        return _base_name(node.value)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _texts(node: ast.ClassDef) -> dict[str, str]:
    """The class attributes assigned a plain string."""
    found: dict[str, str] = {}
    for line in node.body:
        targets = line.targets if isinstance(line, ast.Assign) else [line.target] if isinstance(line, ast.AnnAssign) else []
        value = line.value if isinstance(line, ast.Assign | ast.AnnAssign) else None
        if isinstance(value, ast.Constant) and isinstance(value.value, str):
            found |= {target.id: value.value for target in targets if isinstance(target, ast.Name)}
    return found


def _import(target: str) -> Any:
    module, _, attribute = target.rpartition(":")
    if not module or module.startswith("."):
        raise ScenarioError(f"cannot import {target!r}: write it as package.module:name")
    try:
        loaded = _load_file(Path(module)) if module.endswith(".py") else importlib.import_module(module)
    except Exception as error:
        raise ScenarioError(f"cannot import {target!r}: {type(error).__name__}: {error}") from error
    if not hasattr(loaded, attribute):
        raise ScenarioError(f"cannot import {target!r}: {module} has no {attribute!r}{near(attribute, vars(loaded))}")
    return getattr(loaded, attribute)


def _load_file(file: Path) -> Any:
    name = f"flpriv_plugin_{file.stem}_{hashlib.sha256(str(file).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
