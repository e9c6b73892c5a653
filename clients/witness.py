"""Where a site writes what it alone may know: its witness of each round, and its own log."""

from __future__ import annotations

import traceback
from datetime import UTC, datetime
from pathlib import Path

from flpriv.files import private_folder, write_private
from flpriv.witness import Witness


def write_witness(folder: Path, witness: Witness) -> None:
    """Write ``round-0001.json`` into the site's folder, whole or not at all; a repeated round replaces its file.

    Raises:
        CaptureError: if the folder cannot be written.
    """
    write_private(private_folder(folder) / f"round-{witness.round:04d}.json", witness.to_json().encode())


def log_error(folder: Path, *, round: int, error: BaseException) -> None:
    """Append what went wrong, with its traceback, to the site's own ``log.txt``.

    Raises:
        CaptureError: if the folder cannot be made.
    """
    text = "".join(traceback.format_exception(error))
    path = private_folder(folder) / "log.txt"
    path.touch(mode=0o600)
    with path.open("a", encoding="utf-8") as file:
        file.write(f"{datetime.now(UTC).isoformat(timespec='seconds')} round {round}\n{text}\n")
