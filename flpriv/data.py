"""A scenario's sites and task, opened once per process: a stateless client does not read its images again every round."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flpriv.arrangement import FEDERATED, ArrangedSplit, Arrangement, Node, arrange
from flpriv.errors import DataError, ScenarioError, near
from flpriv.registry import create, find, plugins
from flpriv.site import Site, Sites, Split, SplitPlan, load, split_patients
from flpriv.task import Task

if TYPE_CHECKING:
    from flpriv.records import Records
    from flpriv.scenario import Scenario

_VARIABLE = re.compile(r"\$\{(\w+)\}")


def source(scenario: Scenario) -> Sites:
    """The scenario's source of sites, its ``root`` resolved against the scenario's folder and the environment.

    Raises:
        ScenarioError: for an unknown option, or an environment variable that is not set.
    """
    return _source(_key(scenario))


def sites(scenario: Scenario) -> tuple[Site, ...]:
    """All sites with every entry's split decided; no image is read.

    Raises:
        DataError: naming the file, row, site or patient that is wrong.
    """
    return _sites(_key(scenario))


def records(scenario: Scenario, site: int, split: Split) -> Records:
    """The images of one split of the site at index ``site``, read once per process.

    Raises:
        DataError: if there is no such site, or an image cannot be read.
    """
    known = sites(scenario)
    if not 0 <= site < len(known):
        raise DataError(f"no site with index {site}: the source has {len(known)} sites")
    return _records(_key(scenario), site, split)


def nodes(scenario: Scenario, arrangement: Arrangement = FEDERATED) -> tuple[Node, ...]:
    """Who trains on whose records under an arrangement; no image is read.

    Raises:
        ScenarioError: if ``federation.silo`` is no site.
        DataError: as :func:`sites`.
    """
    silo, names = scenario.federation.silo, [site.name for site in sites(scenario)]
    if silo is not None and silo not in names:
        raise ScenarioError(f"federation.silo: no site is called {silo!r}{near(silo, names)}")
    return _nodes(_key(scenario), arrangement, silo, scenario.seed)


def node_records(scenario: Scenario, arrangement: Arrangement, node: int, split: ArrangedSplit) -> Records:
    """The images of one split of the node at index ``node``; attribute ``"site"`` tells where each comes from.

    Raises:
        DataError: if there is no such node, or an image cannot be read.
    """
    if arrangement in (FEDERATED, "untrained"):
        return records(scenario, node, split)
    known = nodes(scenario, arrangement)
    if not 0 <= node < len(known):
        raise DataError(f"no node with index {node}: the arrangement {arrangement!r} has {len(known)} nodes")
    return _node_records(_key(scenario), arrangement, scenario.federation.silo, scenario.seed, node, split)


def task(scenario: Scenario, defenses: tuple[str, ...] = ()) -> Task:
    """The task the sites agree on under a stack of defences (labels)."""
    opened = source(scenario)
    specs = [spec for spec in map(scenario.defense, defenses) if _changes_models(spec.defense, scenario.plugins)]
    named = [*plugins("models", files=scenario.plugins).values(), *plugins("defenses", files=scenario.plugins).values()]
    used = {scenario.model.name, *(spec.defense for spec in specs)}
    files = sorted({p.target.rpartition(":")[0] for p in named if p.name in used and ".py:" in p.target})
    return Task(
        modality=opened.modality,
        shape=opened.shape,
        classes=tuple(opened.classes),
        model=scenario.model.name,
        options=scenario.model.options,
        mean=scenario.model.mean,
        std=scenario.model.std,
        changes=tuple((spec.defense, dict(spec.options)) for spec in specs),
        plugins=tuple(files),
    )


def _changes_models(name: str, files: tuple[Path, ...]) -> bool:
    from flpriv.defense import Defense

    return find("defenses", name, files=files).architecture is not Defense.architecture


def _key(scenario: Scenario) -> str:
    from dataclasses import asdict

    return json.dumps(
        {
            "source": scenario.sites.source,
            "split": asdict(scenario.sites.split),
            "options": _resolved(scenario.sites.options, scenario.root),
            "plugins": [str(path) for path in scenario.plugins],
        },
        sort_keys=True,
    )


def _resolved(options: Mapping[str, Any], root: Path) -> dict[str, Any]:
    """Options with ``${NAME}`` filled in and a relative ``root`` taken from the scenario's folder."""

    def fill(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise ScenarioError(f"sites.root: environment variable {name} is not set; set it or give --set sites.root=PATH")
        return os.environ[name]

    done = {key: _VARIABLE.sub(fill, value) if isinstance(value, str) else value for key, value in options.items()}
    if isinstance(done.get("root"), str):
        done["root"] = str((root / done["root"]).resolve())
    return done


@lru_cache(maxsize=4)
def _source(key: str) -> Sites:
    facts = json.loads(key)
    opened: Sites = create("sites", facts["source"], facts["options"], files=[Path(p) for p in facts["plugins"]])
    return opened


@lru_cache(maxsize=4)
def _sites(key: str) -> tuple[Site, ...]:
    return split_patients(_source(key).list(), SplitPlan(**json.loads(key)["split"]))


@lru_cache(maxsize=4096)
def _records(key: str, site: int, split: Split) -> Records:
    return load(_sites(key)[site], split, shape=_source(key).shape)


@lru_cache(maxsize=16)
def _nodes(key: str, arrangement: Arrangement, silo: str | None, seed: int) -> tuple[Node, ...]:
    return arrange(_sites(key), arrangement, silo=silo, seed=seed)


@lru_cache(maxsize=256)
def _node_records(key: str, arrangement: Arrangement, silo: str | None, seed: int, node: int, split: ArrangedSplit) -> Records:
    from flpriv.records import Records

    everyone = [_records(key, site, split) for site in range(len(_sites(key)))]
    first = list(accumulate(map(len, everyone), initial=0))
    places = _nodes(key, arrangement, silo, seed)[node].places(split)
    return Records.concat(everyone).take([first[site] + row for site, row in places])
