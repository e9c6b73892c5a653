"""Who may import whom: contracts stand below, families beside each other, tools above."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("attacks", "clients", "defenses", "strategies")
CONTRACTS = {
    *(
        "arrangement",
        "attack",
        "bands",
        "cache",
        "canary",
        "capture",
        "claim",
        "data",
        "defense",
        "errors",
        "files",
        "finding",
        "model",
        "progress",
        "property",
        "recipe",
        "records",
    ),
    *(
        "registry",
        "scenario",
        "scratch",
        "secure_aggregation",
        "seeds",
        "site",
        "state",
        "sums",
        "task",
        "threat",
        "truth",
        "witness",
    ),
}
FLOWER = (
    "flpriv/defense.py",
    "flpriv/engine/",
    "flpriv/testing",
    "clients/app.py",
    "clients/secure_aggregation.py",
    "strategies/",
)
"""Where Flower may be imported."""
FAMILY_TOOLS = {
    "attacks": {"jobs"},
    "clients": {"engine.config"},
    "strategies": {"engine.config", "knowledge", "store"},
}
"""Tools a family may use beyond contracts: attacks train models side by side, both apps read one run-config, the wiretap writes
captures, and a malicious operator holds the records it asks about."""


@dataclass(frozen=True)
class Import:
    """``file`` at ``line`` imports ``target``, an absolute dotted name."""

    file: str
    line: int
    target: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.target}"


def imports(file: Path, root: Path = ROOT) -> Iterator[Import]:
    """Every import in a file, those inside functions and type-checking blocks included."""
    name = file.relative_to(root)
    parts = name.with_suffix("").parts
    module = ("flpriv", *parts) if parts[0] in FAMILIES else parts
    package = module if file.stem == "__init__" else module[:-1]
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (Import(name.as_posix(), node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            source = ".".join((*base, *([node.module] if node.module else [])))
            yield from (Import(name.as_posix(), node.lineno, f"{source}.{alias.name}") for alias in node.names)


def sources(*folders: str) -> list[Path]:
    """Python files under top-level folders; the links inside ``flpriv`` are left out."""
    links = {ROOT / "flpriv" / family for family in FAMILIES}
    files = (file for folder in folders for file in sorted((ROOT / folder).rglob("*.py")))
    return [file for file in files if not links & set(file.parents)]


def family(target: str) -> str:
    """The family a dotted name belongs to, or an empty string."""
    parts = target.split(".")
    return parts[1] if parts[0] == "flpriv" and len(parts) > 1 and parts[1] in FAMILIES else ""


def tool(target: str) -> str:
    """The tool of flpriv a dotted name belongs to (``"measures.membership"``), or an empty string."""
    parts = target.split(".")
    if parts[0] != "flpriv" or len(parts) < 2 or parts[1] in CONTRACTS or parts[1] in FAMILIES or parts[1] == "__version__":
        return ""
    return ".".join(parts[1:])


def from_source(text: str, name: str, folder: Path) -> list[Import]:
    """The imports of a made-up file."""
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return list(imports(file, folder))


def test_imports_are_read_wherever_they_stand(tmp_path: Path) -> None:
    text = "import os.path\ndef f():\n    from . import sibling\n    from ..site.other import thing\nfrom flpriv import capture\n"
    found = {i.target for i in from_source(text, "attacks/inversion/x.py", tmp_path)}
    assert found == {"os.path", "flpriv.attacks.inversion.sibling", "flpriv.attacks.site.other.thing", "flpriv.capture"}
    assert family("flpriv.attacks.site.other") == "attacks"
    assert tool("flpriv.measures.membership") == "measures.membership"
    assert not tool("flpriv.capture.Capture")
    assert not family("flpriv.attack.Attack")


def test_every_folder_is_seen() -> None:
    for folder in ("flpriv", *FAMILIES):
        assert sources(folder), f"no Python file under {folder}/"


def test_contracts_exist() -> None:
    assert {name for name in CONTRACTS if not (ROOT / "flpriv" / f"{name}.py").is_file()} == set()


def test_flpriv_itself_imports_no_family() -> None:
    wrong = [str(i) for file in sources("flpriv") for i in imports(file) if family(i.target)]
    assert not wrong, "\n".join(wrong)


def test_contracts_import_no_tool() -> None:
    files = [ROOT / "flpriv" / f"{name}.py" for name in sorted(CONTRACTS)]
    wrong = [str(i) for file in files for i in imports(file) if tool(i.target)]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_imports_contracts_and_itself(name: str) -> None:
    allowed = FAMILY_TOOLS.get(name, set())
    wrong = [
        str(i)
        for file in sources(name)
        for i in imports(file)
        if family(i.target) not in ("", name)
        or (tool(i.target) and not any(f"{tool(i.target)}.".startswith(f"{known}.") for known in allowed))
    ]
    assert not wrong, "\n".join(wrong)


def test_attacks_know_neither_truth_nor_measures() -> None:
    secret = ("flpriv.truth", "flpriv.measures", "flpriv.witness", "flpriv.data", "flpriv.knowledge")
    wrong = [str(i) for file in sources("attacks") for i in imports(file) if i.target.startswith(secret)]
    assert not wrong, "\n".join(wrong)


def test_flower_is_imported_in_few_places() -> None:
    files = sources("flpriv", *FAMILIES)
    wrong = [
        str(i) for file in files for i in imports(file) if i.target.split(".")[0] == "flwr" and not i.file.startswith(FLOWER)
    ]
    assert not wrong, "\n".join(wrong)


def test_no_family_is_imported_by_its_bare_name() -> None:
    files = sources("flpriv", *FAMILIES, "tests", "examples")
    wrong = [str(i) for file in files for i in imports(file) if i.target.split(".")[0] in FAMILIES]
    assert not wrong, "\n".join(wrong)


def test_nothing_unpickles() -> None:
    banned = ("pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
    files = sources("flpriv", *FAMILIES)
    wrong = [str(i) for file in files for i in imports(file) if i.target.split(".")[0] in banned]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("module", ["flpriv", "flpriv.cli", "flpriv.scenario", "flpriv.registry", "flpriv.threat"])
def test_the_command_line_starts_without_heavy_libraries(module: str) -> None:
    heavy = "{'torch', 'monai', 'ray', 'flwr', 'opacus', 'sklearn', 'scipy', 'pandas', 'matplotlib', 'pydicom', 'nibabel'}"
    code = f"import sys, {module}; print(*sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
