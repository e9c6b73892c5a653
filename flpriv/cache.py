"""What an adversary works out once from public data and uses again: weights of priors, tuned settings.

One safetensors file for each key, in ``$FLPRIV_CACHE``, else ``$XDG_CACHE_HOME/flpriv``, else ``~/.cache/flpriv``; anything there
may be deleted at any time. Nothing of an audited site is ever kept here.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private
from flpriv.progress import tell


def folder() -> Path:
    """Where the cache lies."""
    if own := os.environ.get("FLPRIV_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flpriv"


def recall(what: str, key: Mapping[str, Any], make: Callable[[], Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors kept under ``key``, or those of ``make()``, which are then kept.

    A damaged file is made anew, and a cache that cannot be written to is only told of: the result is the same.

    Args:
        what: kind of thing, a folder's name.
        key: plain data on which the result depends, all of it.
        make: works the tensors out.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load, save

    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    path = folder() / what / f"{digest}.safetensors"
    try:
        return load(path.read_bytes())
    except (OSError, SafetensorError):
        made = {name: value.detach().cpu().contiguous() for name, value in make().items()}
    try:
        private_folder(path.parent)
        write_private(path, save(made))
    except CaptureError as error:
        tell(what, 1, 1, f"not kept for the next time: {error}")
    return made
