"""Plugins are found by folder, entry point and file, without being imported, and their options are checked."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, get_args

import pytest

from flpriv.errors import ScenarioError
from flpriv.registry import Kind, Plugin, build_model, create, find, flower_strategies, plugins, validate
from flpriv.task import Task

ROOT = Path(__file__).resolve().parents[1]
KINDS: tuple[Kind, ...] = get_args(Kind)
OURS = [(kind, name) for kind in KINDS for name in plugins(kind)]

DEFENSE = '''
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal
from pydantic import Field
from flpriv.defense import Defense

@dataclass(frozen=True, kw_only=True)
class Shuffle(Defense):
    """Shuffles rows.

    Args:
        rows: how many, > 0.
        order: which way.
    """

    name: ClassVar[str] = "shuffle"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "A. Author, Shuffling, 2020"
    rows: Annotated[int, Field(gt=0)] = 2
    order: Literal["up", "down"] = "up"
'''


@pytest.fixture
def shuffle(tmp_path: Path) -> Path:
    file = tmp_path / "shuffle.py"
    file.write_text(DEFENSE)
    return file


def test_a_file_brings_a_plugin(shuffle: Path) -> None:
    found = plugins("defenses", files=[shuffle])["shuffle"]
    assert found == Plugin(
        kind="defenses", name="shuffle", target=f"{shuffle}:Shuffle", summary="Shuffles rows.", paper="A. Author, Shuffling, 2020"
    )
    made = create("defenses", "shuffle", {"rows": 3}, files=[shuffle])
    assert (made.rows, made.order) == (3, "up")
    assert find("defenses", "shuffle", files=[shuffle]) is type(made), "the file is imported once"
    assert "shuffle" not in plugins("attacks", files=[shuffle])
    assert "shuffle" not in plugins("defenses")


def test_listing_does_not_run_the_file(tmp_path: Path) -> None:
    file = tmp_path / "loud.py"
    file.write_text('Defense = object\nclass Loud(Defense):\n    name = "loud"\nraise RuntimeError("imported")\n')
    assert "loud" in plugins("defenses", files=[file])
    with pytest.raises(ScenarioError, match=r"loud\.py:Loud'.*RuntimeError: imported"):
        find("defenses", "loud", files=[file])


def test_a_class_without_a_name_or_of_another_base_is_no_plugin(tmp_path: Path) -> None:
    file = tmp_path / "few.py"
    file.write_text(
        "class Base(Defense):\n    pass\n"
        'class Other(Thing):\n    name = "other"\n'
        'class Sub(mod.Defense[int]):\n    name: str = "sub"\n'
    )
    found = {name for name, plugin in plugins("defenses", files=[file]).items() if plugin.target.startswith(str(file))}
    assert found == {"sub"}


def test_files_of_the_same_name_stay_apart(tmp_path: Path) -> None:
    for folder, name in (("a", "one"), ("b", "two")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(DEFENSE.replace('"shuffle"', f'"{name}"'))
    files = [tmp_path / "a" / "mine.py", tmp_path / "b" / "mine.py"]
    one, two = find("defenses", "one", files=files), find("defenses", "two", files=files)
    assert (one.name, two.name) == ("one", "two")
    assert one is find("defenses", "one", files=files)
    assert create("defenses", "one", {"rows": 5}, files=files).rows == 5


def test_two_plugins_of_one_name_are_refused(shuffle: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.py"
    other.write_text(DEFENSE)
    with pytest.raises(ScenarioError, match=r"two defenses are called 'shuffle': .*shuffle\.py:Shuffle and .*other\.py:Shuffle"):
        plugins("defenses", files=[shuffle, other])
    assert "shuffle" in plugins("defenses", files=[shuffle, shuffle])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"row": 3}, "defense 'shuffle': unknown option 'row'; did you mean 'rows'?"),
        ({"rows": 0}, "defense 'shuffle': rows = 0: Input should be greater than 0"),
        ({"rows": "many"}, "defense 'shuffle': rows = 'many': Input should be a valid integer"),
        ({"order": "left"}, "defense 'shuffle': order = 'left': Input should be 'up' or 'down'"),
    ],
)
def test_options_are_checked(shuffle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ScenarioError) as error:
        create("defenses", "shuffle", options, files=[shuffle])
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("kind", KINDS)
def test_an_unknown_name_is_refused(kind: Kind) -> None:
    with pytest.raises(ScenarioError, match=r"unknown .* 'no-such-thing'"):
        find(kind, "no-such-thing")


def test_a_misspelt_name_is_answered_with_the_near_one(shuffle: Path) -> None:
    with pytest.raises(ScenarioError, match="unknown defense 'shufle'; did you mean 'shuffle'"):
        find("defenses", "shufle", files=[shuffle])


def test_a_file_that_is_not_there_or_not_python_is_named(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"no such file: .*gone\.py"):
        plugins("attacks", files=[tmp_path / "gone.py"])
    (tmp_path / "bad.py").write_text("x = 1\ndef f(:\n")
    with pytest.raises(ScenarioError, match=r"bad\.py: line 2"):
        plugins("attacks", files=[tmp_path / "bad.py"])


def test_an_installed_package_brings_plugins_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "third_party.py").write_text(DEFENSE)
    info = tmp_path / "third_party-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: third-party\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[flpriv.defenses]\nshuffle = third_party:Shuffle\n[flpriv.attacks]\nbroken = third_party:Nothing\n"
    )
    code = """
from flpriv.errors import ScenarioError
from flpriv.registry import create, find, plugins
print(plugins("defenses")["shuffle"].summary, create("defenses", "shuffle", {"rows": 7}).rows)
try:
    find("attacks", "broken")
except ScenarioError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True, cwd=tmp_path)
    made, refused = done.stdout.splitlines()
    assert made == "from third-party 7"
    assert refused.startswith("cannot import 'third_party:Nothing': third_party has no 'Nothing'")


def _task(model: str, **options: object) -> Task:
    return Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model=model, options=options)


def test_a_model_is_built_from_an_import_path() -> None:
    model = build_model(_task("torch.nn:Linear", in_features=3, out_features=2))
    assert tuple(dict(model.named_parameters())["weight"].shape) == (2, 3)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("torch.nn:Linaer", r"torch\.nn has no 'Linaer'; did you mean 'Linear'"),
        ("no_such_module:Net", "cannot import 'no_such_module:Net': ModuleNotFoundError"),
        (":Net", "write it as package.module:name"),
        (".here:Net", "write it as package.module:name"),
        ("torch.nn:Linear", "model 'torch.nn:Linear': .*in_features"),
        ("no-such-model", "unknown model 'no-such-model'"),
    ],
)
def test_a_model_that_cannot_be_built_is_named(model: str, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        build_model(_task(model))


def test_an_error_a_plugin_raises_on_purpose_is_shown(tmp_path: Path) -> None:
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Two:
        low: int = 0
        high: int = 1

        def __post_init__(self) -> None:
            if self.low > self.high:
                raise ValueError("low is above high")

    with pytest.raises(ScenarioError, match=r"here: options = .*low is above high"):
        validate(Two, {"low": 3}, where="here")


@pytest.mark.parametrize(("kind", "name"), OURS)
def test_our_plugins_keep_the_rules(kind: Kind, name: str) -> None:
    plugin = plugins(kind)[name]
    loaded: Any = plugin.load()
    assert loaded.name == name
    assert loaded.__dataclass_params__.frozen
    assert all(field.kw_only for field in dataclasses.fields(loaded))
    assert plugin.summary.endswith(".")
    assert plugin.target.partition(":")[0].rpartition(".")[2] == name.replace("-", "_"), "the file is named as the plugin"
    assert loaded.__pydantic_config__["extra"] == "forbid"


def test_flowers_strategies_are_listed_and_can_be_built() -> None:
    from flwr.serverapp import strategy

    found = {plugin.name: plugin for plugin in flower_strategies()}
    assert {"FedAvg", "FedProx", "FedAdam", "Krum"} <= set(found)
    for plugin in found.values():
        assert issubclass(plugin.load(), strategy.Strategy)
        assert plugin.summary
