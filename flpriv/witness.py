"""What a site notes beside the run, never in a message: which records each local step used, and what its defences said."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flpriv.errors import CaptureError

FOLDER = "witness"
"""Where the sites' folders lie within a setting's folder."""


@dataclass(frozen=True, kw_only=True)
class Witness:
    """One site in one round.

    Args:
        site: its name.
        node: the pseudonym under which the server knew it.
        round: 1, 2, ….
        steps: record ids of each local step, in order of use.
        notes: defence label to what that defence said (``{"epsilon": 1.3}``).
        refused: why the site took no part, ``None`` where it did.
    """

    site: str
    node: int
    round: int
    steps: tuple[tuple[str, ...], ...]
    notes: Mapping[str, Mapping[str, float | str]] = field(default_factory=dict)
    refused: str | None = None

    @property
    def used(self) -> tuple[str, ...]:
        """The distinct record ids, in order of first use."""
        return tuple(dict.fromkeys(id for step in self.steps for id in step))

    def to_json(self) -> str:
        """One line of JSON; :func:`read_witness` reads it back."""
        return json.dumps(
            {
                "site": self.site,
                "node": self.node,
                "round": self.round,
                "steps": [list(step) for step in self.steps],
                "notes": {label: dict(notes) for label, notes in self.notes.items()},
                "refused": self.refused,
            }
        )


def site_folder(setting_folder: Path, site: int) -> Path:
    """The private folder of the site at index ``site``."""
    return setting_folder / FOLDER / f"site-{site:04d}"


def read_witness(file: Path) -> Witness:
    """One witness.

    Raises:
        CaptureError: naming the file that is missing, cut short or of another layout.
    """
    try:
        found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return Witness(
            site=str(found["site"]),
            node=int(found["node"]),
            round=int(found["round"]),
            steps=tuple(tuple(map(str, step)) for step in found["steps"]),
            notes={label: dict(notes) for label, notes in found["notes"].items()},
            refused=found["refused"],
        )
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaptureError(f"{file}: not a witness ({error}); run the setting again") from error


def read_witnesses(setting_folder: Path) -> list[Witness]:
    """All witnesses of a setting by site and round; none where the sites keep theirs elsewhere.

    Raises:
        CaptureError: naming the file that cannot be read.
    """
    return [read_witness(file) for file in sorted((setting_folder / FOLDER).glob("site-*/round-*.json"))]
