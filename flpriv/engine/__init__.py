"""Engines: the same two Flower apps in this process, or on Flower's simulation runtime."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flpriv.scenario import Scenario, Setting


def run(scenario: Scenario, setting: Setting, *, folder: Path, resume: bool = False) -> None:
    """Run one setting on the scenario's engine; everything it leaves lies in ``folder``.

    Args:
        scenario: the whole scenario.
        setting: one of its settings.
        folder: the setting's folder, created with mode 0700.
        resume: go on after the last finished round found in ``folder``.

    Raises:
        RunError: if the federation cannot be run to its end.
    """
    if scenario.engine == "simulation":
        from flpriv.engine.simulation import run as start
    else:
        from flpriv.engine.inline import run as start
    start(scenario, setting, folder=folder, resume=resume)


def check(scenario: Scenario) -> None:
    """Make the scenario's strategy once, so that a wrong name or option is told before anything runs.

    Raises:
        ScenarioError: naming the strategy and the option, or what secure aggregation does not allow.
    """
    from flpriv import data

    build = importlib.import_module("flpriv.strategies.building").build_strategy
    federation, sites = scenario.federation, len(data.sites(scenario))
    for nodes in sorted({sites, *(len(data.nodes(scenario, setting.arrangement)) for setting in scenario.settings())}):
        strategy = build(federation.strategy, federation.options, sites=nodes, files=scenario.plugins)
    if federation.secure_aggregation is not None:
        federation.secure_aggregation.check(sites)
        importlib.import_module("flpriv.strategies.secure_aggregation").check_strategy(strategy, federation.strategy)
