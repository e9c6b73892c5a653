"""Files that hold patients' data: private to the user, written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from flpriv.errors import CaptureError


def private_folder(folder: Path) -> Path:
    """Make ``folder`` (and its parents) with mode 0700 and return it.

    Raises:
        CaptureError: if it cannot be made.
    """
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        folder.chmod(0o700)
    except OSError as error:
        raise CaptureError(f"{folder}: cannot make the folder: {error.strerror or error}") from error
    return folder


def write_private(path: Path, content: bytes) -> None:
    """Write ``content`` to ``path`` with mode 0600: a reader sees the old file or the new one, never half of it.

    Raises:
        CaptureError: if the disk is full or the folder cannot be written; an existing file stays as it was.
    """
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).replace(path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise CaptureError(
            f"{path}: cannot be written: {error.strerror or error}; free space or give --out another folder"
        ) from error
