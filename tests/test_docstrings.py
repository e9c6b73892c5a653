"""Every public name says what it is; every option of a plugin and every error raised is described."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("flpriv", "attacks", "clients", "defenses", "strategies")
PLUGIN = re.compile(r".*(Attack|Defense|Strategy|Sites|Model)$")

Function = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True)
class Class:
    """A class as it stands in the source."""

    bases: tuple[str, ...]
    documented: frozenset[str] = field(default_factory=frozenset)


def files() -> list[Path]:
    links = {ROOT / "flpriv" / folder for folder in FOLDERS}
    found = (file for folder in FOLDERS for file in sorted((ROOT / folder).rglob("*.py")))
    return [file for file in found if not links & set(file.parents)]


def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def public(body: Sequence[ast.stmt]) -> Iterator[Function | ast.ClassDef]:
    for node in body:
        if isinstance(node, Function | ast.ClassDef) and not node.name.startswith("_"):
            yield node


def last_name(node: ast.expr) -> str:
    if isinstance(node, ast.Subscript | ast.Call):
        return last_name(node.value if isinstance(node, ast.Subscript) else node.func)
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def classes() -> dict[str, Class]:
    """All classes by name, private ones too, with the methods they document."""
    found = {}
    for file in files():
        for node in ast.walk(parsed(file)):
            if isinstance(node, ast.ClassDef):
                methods = frozenset(m.name for m in node.body if isinstance(m, Function) and ast.get_docstring(m))
                found[node.name] = Class(tuple(map(last_name, node.bases)), methods)
    return found


def inherits(name: str, method: str, known: dict[str, Class]) -> bool:
    """Whether a base documents ``method``; the bases of other libraries are taken to."""
    for base in known[name].bases:
        if base not in known:
            if base not in ("ABC", "object", "Protocol", "Generic", ""):
                return True
        elif method in known[base].documented or inherits(base, method, known):
            return True
    return False


def undocumented(tree: ast.Module, known: dict[str, Class]) -> Iterator[str]:
    if not ast.get_docstring(tree):
        yield "the module"
    for node in public(tree.body):
        if not ast.get_docstring(node):
            yield node.name
        if isinstance(node, ast.ClassDef):
            for inner in public(node.body):
                if not ast.get_docstring(inner) and not inherits(node.name, inner.name, known):
                    yield f"{node.name}.{inner.name}"


def undescribed_options(node: ast.ClassDef) -> list[str]:
    """Fields of a plugin that its docstring's Args leave out."""
    described = set(re.findall(r"^\s+(\w+): \S", ast.get_docstring(node, clean=False) or "", flags=re.MULTILINE))
    names = [
        line.target.id
        for line in node.body
        if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
        if last_name(line.annotation) != "ClassVar" and not (line.value and "init=False" in ast.unparse(line.value))
    ]
    return [name for name in names if not name.startswith("_") and name not in described]


def raised(function: Function) -> set[str]:
    """Errors of flpriv a function raises itself."""
    found = (last_name(node.exc) for node in ast.walk(function) if isinstance(node, ast.Raise) and node.exc)
    return {name for name in found if name in _errors()}


def _errors() -> set[str]:
    return {node.name for node in public(parsed(ROOT / "flpriv" / "errors.py").body) if isinstance(node, ast.ClassDef)}


def test_the_checks_see_what_is_missing() -> None:
    source = '''
class Base(ABC):
    """A base."""
    def run(self):
        """Run."""
class One(Base):
    def run(self): ...
    def other(self): ...
class TwoAttack(Base):
    """A plugin.

    Args:
        told: of this.
    """
    name: ClassVar[str] = "two"
    told: int = 0
    untold: int = 0
def loud():
    """Shout."""
    raise DataError("no")
'''
    tree = ast.parse(source)
    found = {
        node.name: Class(
            tuple(map(last_name, node.bases)),
            frozenset(m.name for m in node.body if isinstance(m, Function) and ast.get_docstring(m)),
        )
        for node in tree.body
        if isinstance(node, ast.ClassDef)
    }
    assert list(undocumented(tree, found)) == ["the module", "One", "One.other"]
    two, loud = tree.body[2], tree.body[3]
    assert isinstance(two, ast.ClassDef)
    assert isinstance(loud, ast.FunctionDef)
    assert undescribed_options(two) == ["untold"]
    assert raised(loud) == {"DataError"}


@pytest.mark.parametrize("folder", FOLDERS)
def test_every_public_name_has_a_docstring(folder: str) -> None:
    known = classes()
    missing = [
        f"{file.relative_to(ROOT)}: {name}"
        for file in files()
        if file.is_relative_to(ROOT / folder)
        for name in undocumented(parsed(file), known)
    ]
    assert not missing, "\n".join(missing)


def test_every_option_of_a_plugin_is_described() -> None:
    missing = [
        f"{file.relative_to(ROOT)}: {node.name}.{option}"
        for file in files()
        for node in public(parsed(file).body)
        if isinstance(node, ast.ClassDef) and any(PLUGIN.match(last_name(base)) for base in node.bases)
        for option in undescribed_options(node)
    ]
    assert not missing, "\n".join(missing)


def test_every_error_raised_is_described() -> None:
    missing = []
    for file in files():
        if file == ROOT / "flpriv" / "cli.py":  # its docstrings are the help
            continue
        tree = parsed(file)
        owners: list[ast.Module | ast.ClassDef] = [tree, *(n for n in public(tree.body) if isinstance(n, ast.ClassDef))]
        for owner in owners:
            for node in public(owner.body):
                if isinstance(node, Function) and (text := ast.get_docstring(node)):
                    missing += [
                        f"{file.relative_to(ROOT)}: {node.name} raises {name}"
                        for name in raised(node)
                        if name not in text and "FlprivError:" not in text
                    ]
    assert not missing, "\n".join(missing)
