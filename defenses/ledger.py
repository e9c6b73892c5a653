"""What a site has spent of its privacy so far: one file beside the site, composed over rounds and restarts."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from flpriv.defense import Local
from flpriv.errors import RunError
from flpriv.files import private_folder, write_private
from flpriv.state import State

Accountant = Literal["rdp", "prv"]


@dataclass(frozen=True, kw_only=True)
class Spent:
    """Everything released so far.

    Args:
        history: (noise multiplier, sample rate, steps) of each release, in order of rounds.
    """

    history: tuple[tuple[float, float, int], ...]

    def epsilon(self, delta: float, *, accountant: Accountant = "rdp") -> float:
        """ε at ``delta`` of all releases together, by Opacus' accountant of that name; 0 for none."""
        from opacus.accountants import create_accountant

        steps = [entry for entry in self.history if entry[2]]
        if not steps:
            return 0.0
        books = create_accountant(accountant)
        books.history = steps
        return float(books.get_epsilon(delta=delta))


def spend(local: Local, *, ledger: str, key: str, noise_multiplier: float, sample_rate: float, steps: int) -> Spent:
    """Enter one release into the site's ``ledger`` (the defence's name) and return everything spent so far.

    A release is known by its round and ``key``: a round that is redone after a crash from the same model with the same seed
    releases nothing new and counts once; the same round asked for again with another model counts again. Where the site has
    no folder, every earlier round is counted as if it had been like this one.

    Raises:
        RunError: if the ledger cannot be read, so that nothing is released on a guess.
    """
    entry = (noise_multiplier, sample_rate, steps)
    if local.folder is None:
        return Spent(history=(entry,) * max(local.round, 1))
    file = private_folder(local.folder) / f"privacy-{ledger}.json"
    entries = {**_read(file), f"round-{local.round:04d}-{key}": entry}
    write_private(file, json.dumps(entries, indent=1).encode())
    return Spent(history=tuple(entries[name] for name in sorted(entries)))


def fingerprint(state: State) -> str:
    """A short hash of all tensors of ``state``, by name."""
    digest = hashlib.sha256()
    for key in sorted(state):
        digest.update(key.encode())
        digest.update(state[key].detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _read(file: Path) -> dict[str, tuple[float, float, int]]:
    try:
        found = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
        return {str(name): (float(z), float(q), int(n)) for name, (z, q, n) in found.items()}
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise RunError(
            f"{file}: not a privacy ledger ({error}); restore it, or move it away to start the account anew"
        ) from error
