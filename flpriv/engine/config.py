"""What both Flower apps read from the run-config: the scenario, the setting, where to write, and whether to go on."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flpriv.errors import ScenarioError
from flpriv.scenario import Scenario, Setting, parse, read

if TYPE_CHECKING:
    from flwr.app import Context


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One federation to run, as a Flower run-config names it.

    Args:
        scenario: the whole scenario.
        setting: the one of its settings that is run.
        out: the setting's folder, absolute.
        resume: whether to go on after the last finished round found in ``out``.
    """

    scenario: Scenario
    setting: Setting
    out: Path
    resume: bool = False

    def to_dict(self) -> dict[str, str | int]:
        """The run-config as Flower takes it, scalars only; :func:`read_run_config` reads it back."""
        return {
            "scenario": self.scenario.to_json(),
            "setting": self.setting.id,
            "out": str(self.out),
            "resume": int(self.resume),
        }


def read_run_config(context: Context) -> RunConfig:
    """The run that ``context`` belongs to; the scenario is parsed once per process.

    ``scenario`` is the path of a TOML or JSON file, or JSON text. ``setting`` may be left out where the scenario has one
    setting only, and ``out`` defaults to ``runs/SETTING`` beside the scenario.

    Raises:
        ScenarioError: for a missing ``scenario``, an unknown setting, or a scenario that does not parse.
    """
    config: Mapping[str, Any] = context.run_config
    scenario, settings = _parsed(str(config.get("scenario", "")))
    name = str(config.get("setting", "")) or _only(settings)
    setting = settings.get(name) or scenario.setting(name)
    out = Path(str(config["out"])) if config.get("out") else scenario.root / "runs" / setting.id
    return RunConfig(scenario=scenario, setting=setting, out=out.resolve(), resume=bool(config.get("resume", False)))


@lru_cache(maxsize=16)
def _parsed(text: str) -> tuple[Scenario, Mapping[str, Setting]]:
    scenario = _scenario(text)
    return scenario, {setting.id: setting for setting in scenario.settings()}


def _scenario(text: str) -> Scenario:
    if not text:
        raise ScenarioError("run-config: no scenario; give --run-config 'scenario=\"/path/scenario.toml\"'")
    if text.startswith("{"):
        return _json(text, root=Path.cwd(), where="run-config: scenario")
    path = Path(text)
    if path.suffix != ".json":
        return read(path)
    try:
        return _json(path.read_text(encoding="utf-8"), root=path.resolve().parent, where=str(path))
    except OSError:
        raise ScenarioError(f"no such scenario: {path}") from None


def _json(text: str, *, root: Path, where: str) -> Scenario:
    try:
        tables = json.loads(text)
    except json.JSONDecodeError as error:
        raise ScenarioError(f"{where}: line {error.lineno}: {error.msg}") from error
    return parse(tables, root=root)


def _only(settings: Mapping[str, Setting]) -> str:
    if len(settings) != 1:
        raise ScenarioError(f"run-config: name one setting, e.g. --run-config 'setting=\"{next(iter(settings), 'none')}\"'")
    return next(iter(settings))
