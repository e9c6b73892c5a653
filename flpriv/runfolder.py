"""A run on disk: which scenario it is of, and where its federations lie."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flpriv.errors import RunError
from flpriv.files import private_folder, write_private
from flpriv.scenario import Scenario, Setting, parse


@dataclass(frozen=True, kw_only=True)
class RunFolder:
    """A run on disk: ``run.json``, ``settings/ID/…`` with captures and witnesses, the verdict and the report."""

    path: Path

    def setting(self, setting: Setting) -> Path:
        """Where one federation lies."""
        return self.path / "settings" / setting.id

    @staticmethod
    def create(path: Path, scenario: Scenario, *, command: str, resume: bool) -> RunFolder:
        """A new run folder, or the one to go on with.

        Raises:
            RunError: if the folder holds another run, or a run and ``resume`` was not asked for.
        """
        mine = {"scenario": scenario.tables(), "command": command}
        if (path / "run.json").is_file():
            if not resume:
                raise RunError(f"{path} holds a run already; go on with --resume, or give --out another folder")
            if RunFolder.open(path).tables() != mine["scenario"]:
                raise RunError(f"{path} holds a run of another scenario; resume it with its own, or give --out another folder")
            return RunFolder(path=path)
        if path.is_dir() and any(path.iterdir()):
            raise RunError(f"{path} is not empty and not a run; give --out another folder")
        private_folder(path)
        write_private(path / "run.json", json.dumps(mine, indent=1).encode())
        return RunFolder(path=path)

    @staticmethod
    def open(path: Path) -> RunFolder:
        """An existing run folder.

        Raises:
            RunError: if ``path`` is none.
        """
        if not (path / "run.json").is_file():
            raise RunError(f"{path} is not a run folder: it has no run.json; give the folder that 'flpriv run' wrote")
        return RunFolder(path=path)

    def tables(self) -> dict[str, Any]:
        """The scenario's tables as they were run."""
        tables: dict[str, Any] = self._read()["scenario"]
        return tables

    def command(self) -> str:
        """The command that made the run."""
        return str(self._read()["command"])

    def scenario(self) -> Scenario:
        """The scenario as it was run."""
        return parse(self.tables(), root=self.path)

    def _read(self) -> dict[str, Any]:
        try:
            found: dict[str, Any] = json.loads((self.path / "run.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise RunError(f"{self.path / 'run.json'}: {error}") from error
        return found
