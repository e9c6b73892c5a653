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


@dataclass(frozen=True, kw_only=True, eq=False)
class RunConfig:
    """One federation to run, as a Flower run-config names it. There is one object per run and process, so it can be a cache key.

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
    text = str(config.get("scenario", ""))
    return _read(
        text, _stamp(text), str(config.get("setting", "")), str(config.get("out", "")), bool(config.get("resume", False))
    )


@lru_cache(maxsize=64)
def _read(text: str, stamp: tuple[int, int], name: str, out: str, resume: bool) -> RunConfig:
    scenario = _parsed(text, stamp)
    setting = scenario.setting(name) if name else _only(scenario)
    folder = Path(out) if out else scenario.root / "runs" / setting.id
    return RunConfig(scenario=scenario, setting=setting, out=folder.resolve(), resume=resume)


@lru_cache(maxsize=16)
def _parsed(text: str, stamp: tuple[int, int]) -> Scenario:
    return _scenario(text)


def _stamp(text: str) -> tuple[int, int]:
    """What changes when a scenario's file does."""
    if text.startswith("{") or not (path := Path(text)).is_file():
        return (0, 0)
    found = path.stat()
    return found.st_mtime_ns, found.st_size


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


def _only(scenario: Scenario) -> Setting:
    first, *others = scenario.settings()
    if others:
        raise ScenarioError(f"run-config: name one setting, e.g. --run-config 'setting=\"{first.id}\"'")
    return first
