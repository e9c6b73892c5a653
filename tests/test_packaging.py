"""However flpriv is installed, the families are found under its name: wheel, sdist, editable, Flower bundle, no links."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import get_args

import pytest

from flpriv.registry import Kind, plugins

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = ("attacks", "clients", "defenses", "strategies")
KINDS: tuple[Kind, ...] = get_args(Kind)
LIST = f"""
import json, flpriv
from flpriv.registry import plugins
import flpriv.attacks, flpriv.clients, flpriv.defenses, flpriv.strategies
print(json.dumps([flpriv.__file__, {{kind: sorted(plugins(kind)) for kind in {KINDS}}}]))
"""


def run(*command: str | Path, cwd: Path) -> str:
    """Standard output of a command; its errors are shown when it fails."""
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(map(str, command))}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def check_found(python: str | Path, *, cwd: Path, under: Path) -> None:
    """A Python started in ``cwd`` imports flpriv from ``under`` and finds every plugin of this checkout."""
    file, found = json.loads(run(python, "-c", LIST, cwd=cwd))
    assert Path(file).is_relative_to(under)
    assert found == {kind: sorted(plugins(kind)) for kind in KINDS}


def family_files(folder: Path, suffix: str = "*") -> set[str]:
    """The files of the four families as ``attacks/inversion/x.py``."""
    found = (file for family in FAMILIES for file in (folder / family).rglob(suffix))
    return {file.relative_to(folder).as_posix() for file in found if file.is_file() and "__pycache__" not in file.parts}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of this checkout as git would make it, links included."""
    copy = tmp_path_factory.mktemp("house") / "flpriv-copy"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "tests")
    shutil.copytree(ROOT, copy, symlinks=True, ignore=skip)
    shutil.copy(ROOT / ".gitignore", copy)
    return copy


@pytest.fixture(scope="module")
def built(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an sdist, and the wheel built from that sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    return out


@pytest.fixture
def empty_venv(tmp_path: Path) -> Path:
    """The Python of a new environment that sees the libraries of this one, but not its flpriv."""
    venv.create(tmp_path / "venv", with_pip=False, symlinks=True)
    python = tmp_path / "venv" / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # The paths named in a .pth file are not searched for further ones, so an editable install of flpriv stays behind.
    (site / "libraries.pth").write_text("\n".join({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}))
    return python


def install(python: Path, *arguments: str | Path, cwd: Path) -> None:
    options = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    run(sys.executable, "-m", "pip", "--python", python, "install", *options, "--ignore-installed", *arguments, cwd=cwd)


def test_the_wheel_holds_each_family_once(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert len(names) == len(set(names))
    assert {name.split("/")[0].split("-")[0] for name in names} == {"flpriv"}
    inside = {name.removeprefix("flpriv/") for name in names if name.startswith(tuple(f"flpriv/{f}/" for f in FAMILIES))}
    assert inside == family_files(ROOT)


def test_the_wheel_holds_what_is_not_python(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    folder = ROOT / "flpriv"
    data = {
        file.relative_to(ROOT).as_posix() for file in folder.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")
    }
    assert {"flpriv/py.typed", "flpriv/demo.toml"} <= data <= set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_from_the_checkout_is_the_wheel_from_the_sdist(checkout: Path, built: Path, tmp_path: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", "--wheel", "--outdir", tmp_path, checkout, cwd=tmp_path)
    (direct,), (through,) = tmp_path.glob("*.whl"), built.glob("*.whl")
    assert sorted(zipfile.ZipFile(direct).namelist()) == sorted(zipfile.ZipFile(through).namelist())


def test_the_sdist_holds_no_links(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        assert not [member.name for member in archive if member.issym() or member.islnk()]


def test_an_installed_wheel_runs(built: Path, empty_venv: Path, tmp_path: Path) -> None:
    install(empty_venv, *built.glob("*.whl"), cwd=tmp_path)
    check_found(empty_venv, cwd=tmp_path, under=tmp_path / "venv")
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert run(empty_venv.with_name("flpriv"), "--version", cwd=tmp_path).strip() == version


def test_an_editable_install_runs(checkout: Path, empty_venv: Path, tmp_path: Path) -> None:
    install(empty_venv, "--editable", checkout, cwd=tmp_path)
    check_found(empty_venv, cwd=tmp_path, under=checkout)


def test_a_checkout_without_links_runs(checkout: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(checkout, copy, symlinks=True)
    for family in FAMILIES:
        (copy / "flpriv" / family).unlink()
        (copy / "flpriv" / family).write_text(f"../{family}")  # what git leaves where the system has no links
    check_found(sys.executable, cwd=copy, under=copy)


def test_the_flower_bundle_runs(checkout: Path, tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    bundle = build_fab_from_disk(checkout)
    assert len(bundle) < 2_000_000
    zipfile.ZipFile(io.BytesIO(bundle)).extractall(tmp_path)
    assert family_files(tmp_path, "*.py") == family_files(ROOT, "*.py")
    assert {path.name for path in tmp_path.iterdir()} == {"flpriv", *FAMILIES, "pyproject.toml", "README.md", "LICENSE", ".info"}
    check_found(sys.executable, cwd=tmp_path, under=tmp_path)


def test_flower_takes_the_app_and_its_components(checkout: Path) -> None:
    from flwr.cli.config_utils import load_and_validate

    config, warnings = load_and_validate(checkout / "pyproject.toml")
    assert warnings == []
    assert set(config["tool"]["flwr"]["app"]["config"]) == {"scenario", "setting", "out", "resume"}


def test_versions_agree() -> None:
    from flpriv import __version__

    assert __version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## [{__version__}]" in (ROOT / "CHANGELOG.md").read_text()


def test_pins_satisfy_the_lower_bounds() -> None:
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {canonicalize_name(name): version for name, version in (line.split("==") for line in lines if "==" in line)}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    required = map(Requirement, [*project["dependencies"], *project["optional-dependencies"]["dev"]])
    wrong = [
        str(one)
        for one in required
        if one.name != "setuptools"
        and (canonicalize_name(one.name) not in pins or not one.specifier.contains(pins[canonicalize_name(one.name)]))
    ]
    assert wrong == []
