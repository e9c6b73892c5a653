"""Scratch space: where long work may leave its state, so that it goes on after an interruption.

The audit opens one for each attack and empties it when the attack is done; without one, nothing is left anywhere.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from torch import Tensor

from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private

_folder: ContextVar[Path | None] = ContextVar("flpriv_scratch", default=None)
_shared: ContextVar[Path | None] = ContextVar("flpriv_shared", default=None)


@contextmanager
def scratch(folder: Path, *, shared: Path | None = None) -> Iterator[None]:
    """Let work within the block leave its state in ``folder`` (mode 0700: it holds what may become patient images).

    Args:
        folder: of this piece of work alone.
        shared: of all pieces of work of a run, for what several of them need and any can make.
    """
    tokens = _folder.set(folder), _shared.set(shared)
    try:
        yield
    finally:
        _folder.reset(tokens[0])
        _shared.reset(tokens[1])


def shared() -> Path | None:
    """Where work leaves what other work of the same run may need too; ``None`` outside a run."""
    return _shared.get()


class Notebook:
    """The state of one piece of work; does nothing where no scratch space is open.

    Args:
        key: plain data that names the work: another key never sees this state.
    """

    def __init__(self, key: Mapping[str, Any]) -> None:
        folder = _folder.get()
        digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
        self._path = folder / f"{digest}.safetensors" if folder is not None else None

    @property
    def open(self) -> bool:
        """Whether anything written will be kept."""
        return self._path is not None

    def write(self, state: Mapping[str, Tensor]) -> None:
        """Replace the state.

        Raises:
            CaptureError: if it cannot be written.
        """
        from safetensors.torch import save

        if self._path is not None:
            private_folder(self._path.parent)
            write_private(self._path, save({k: v.detach().cpu().contiguous() for k, v in state.items()}))

    def read(self) -> dict[str, Tensor] | None:
        """The state left by an interrupted run, or ``None``.

        Raises:
            CaptureError: if the file is damaged.
        """
        from safetensors import SafetensorError
        from safetensors.torch import load

        if self._path is None or not self._path.is_file():
            return None
        try:
            return load(self._path.read_bytes())
        except (OSError, SafetensorError) as error:
            raise CaptureError(f"{self._path}: cannot be read ({error}); delete it and attack again") from error

    def clear(self) -> None:
        """Forget the state: the work is done."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
