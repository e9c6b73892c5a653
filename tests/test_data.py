"""A scenario's sites are opened once per process, its paths resolved, its task agreed on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv import data
from flpriv.errors import DataError, ScenarioError
from flpriv.scenario import Scenario, parse

PLUGINS = """
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import nn

from flpriv.defense import Defense
from flpriv.model import Model
from flpriv.site import Entry, Site, Sites

READ = []


@dataclass(frozen=True, kw_only=True)
class CountedSites(Sites):
    name: ClassVar[str] = "counted"
    modality: str = "xray"
    classes: tuple[str, ...] = ("well", "ill")
    root: str = "images"
    note: str = ""

    @property
    def shape(self):
        return (1, 2, 2)

    def list(self):
        def read(entry):
            READ.append(entry.id)
            return np.full((1, 2, 2), entry.label, np.float32)

        return tuple(
            Site(name=n, entries=tuple(Entry(id=f"{n}{i}", patient=f"{n}{i}", label=i % 2) for i in range(10)), read=read)
            for n in "ab"
        )


@dataclass(frozen=True, kw_only=True)
class FlatModel(Model):
    name: ClassVar[str] = "flat"

    def build(self, shape, classes):
        return nn.Sequential(nn.Flatten(), nn.Linear(4, classes))


@dataclass(frozen=True, kw_only=True)
class Doubled(Defense):
    name: ClassVar[str] = "doubled"
    times: int = 2

    def architecture(self, model):
        return nn.Sequential(*[model] + [nn.Linear(2, 2)] * (self.times - 1))


@dataclass(frozen=True, kw_only=True)
class Quiet(Defense):
    name: ClassVar[str] = "quiet"
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "mine.py").write_text(PLUGINS)
    return tmp_path


def made(root: Path, **changes: Any) -> Scenario:
    tables: dict[str, Any] = {"plugins": ["mine.py"], "sites": {"source": "counted"}, "model": {"name": "flat"}}
    return parse(tables | changes, root=root)


def read_so_far(scenario: Scenario) -> list[str]:
    import sys

    found: list[str] = sys.modules[type(data.source(scenario)).__module__].READ
    return found


def test_images_are_read_once_per_process(root: Path) -> None:
    scenario = made(root)
    assert [site.name for site in data.sites(scenario)] == ["a", "b"]
    assert read_so_far(scenario) == []
    first = data.records(scenario, 1, "train")
    assert len(read_so_far(scenario)) == len(first) == 6
    assert data.records(made(root, seed=5, name="again"), 1, "train") is first
    assert len(read_so_far(scenario)) == 6


def test_another_split_is_another_draw(root: Path) -> None:
    drawn = {seed: made(root, sites={"source": "counted", "split": {"seed": seed}}) for seed in range(5)}
    assert len({data.records(scenario, 0, "train").ids for scenario in drawn.values()}) > 1


@pytest.mark.parametrize("index", [-1, 2])
def test_a_site_that_is_not_there_is_named(root: Path, index: int) -> None:
    with pytest.raises(DataError, match=f"no site with index {index}: the source has 2 sites"):
        data.records(made(root), index, "train")


def test_the_root_starts_beside_the_scenario(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source: Any = data.source(made(root, sites={"source": "counted", "root": "north/images"}))
    assert source.root == str(root / "north" / "images")
    source = data.source(made(root, sites={"source": "counted", "root": "/elsewhere", "note": "as it is"}))
    assert (source.root, source.note) == ("/elsewhere", "as it is")
    monkeypatch.setenv("FLPRIV_TEST_FOLDER", "/from/environment")
    source = data.source(made(root, sites={"source": "counted", "root": "${FLPRIV_TEST_FOLDER}/x"}))
    assert source.root == "/from/environment/x"
    with pytest.raises(ScenarioError, match="environment variable FLPRIV_NO_SUCH is not set"):
        data.source(made(root, sites={"source": "counted", "root": "${FLPRIV_NO_SUCH}"}))


def test_an_option_the_source_does_not_take_is_named(root: Path) -> None:
    with pytest.raises(ScenarioError, match="source of sites 'counted': unknown option 'rot'; did you mean 'root'"):
        data.source(made(root, sites={"source": "counted", "rot": "x"}))


def test_the_task_is_what_everybody_agrees_on(root: Path) -> None:
    scenario = made(
        root,
        model={"name": "flat", "mean": 0.5, "std": 0.25},
        defenses={"twice": {"defense": "doubled", "times": 3}, "quiet": {}},
    )
    plain, changed = data.task(scenario), data.task(scenario, ("quiet", "twice"))
    assert (plain.shape, plain.classes, plain.modality, plain.changes) == ((1, 2, 2), ("well", "ill"), "xray", ())
    assert plain.plugins == (str(root / "mine.py"),)
    assert changed.changes == (("doubled", {"times": 3}),), "only what changes the model is part of the task"
    assert len(changed.build()) == 3  # type: ignore[arg-type]


def test_a_model_is_drawn_from_its_seed_alone(root: Path) -> None:
    task = data.task(made(root, model={"name": "flat", "mean": 0.5, "std": 0.25}))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one, same, other = task.build(seed=3), task.build(seed=3), task.build(seed=4)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.state_dict()["1.weight"], same.state_dict()["1.weight"])
    assert not torch.equal(one.state_dict()["1.weight"], other.state_dict()["1.weight"])


def test_normalisation_happens_inside_and_adds_no_keys(root: Path) -> None:
    bare, normal = (
        data.task(made(root, model={"name": "flat"} | changes)).build(seed=3) for changes in ({}, {"mean": 0.5, "std": 0.25})
    )
    images = torch.rand(3, 1, 2, 2)
    assert normal.state_dict().keys() == bare.state_dict().keys()
    torch.testing.assert_close(normal(images), bare((images - 0.5) / 0.25))
