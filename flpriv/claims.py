"""Claims on disk: safetensors and JSON, atomic, so that an interrupted audit goes on where it stopped."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from flpriv.claim import Claim
from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private
from flpriv.finding import Status

KINDS = {kind.__name__: kind for kind in get_args(Claim)}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What came of running one attack on one capture.

    Args:
        claims: what it asserts, empty unless it succeeded.
        status: ``"ok"``, ``"failed"``, ``"refused"`` or ``"not granted"``, as in :class:`flpriv.finding.Finding`.
        message: why, where it is not ok.
        seconds: how long it took.
    """

    claims: Sequence[Claim] = ()
    status: Status = "ok"
    message: str = ""
    seconds: float = 0.0


def save_outcome(folder: Path, outcome: Outcome) -> None:
    """Write ``outcome.json`` last, after ``claims.safetensors``."""
    from safetensors.torch import save

    private_folder(folder)
    tensors: dict[str, Tensor] = {}
    rows = []
    for place, claim in enumerate(outcome.claims):
        row: dict[str, Any] = {"kind": type(claim).__name__}
        for field in fields(claim):
            value = getattr(claim, field.name)
            if isinstance(value, Tensor):
                tensors[f"{place}.{field.name}"] = value.detach().cpu().contiguous().clone()
            else:
                row[field.name] = value
        rows.append(row)
    write_private(folder / "claims.safetensors", save(tensors or {"empty": torch.zeros(1)}))
    text = {"status": outcome.status, "message": outcome.message, "seconds": outcome.seconds, "claims": rows}
    write_private(folder / "outcome.json", json.dumps(text).encode())


def load_outcome(folder: Path) -> Outcome | None:
    """The outcome in ``folder``, or ``None`` if that attack has not finished there.

    Raises:
        CaptureError: if the files are damaged.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not (folder / "outcome.json").is_file():
        return None
    try:
        text = json.loads((folder / "outcome.json").read_text(encoding="utf-8"))
        tensors = load_file(folder / "claims.safetensors")
        claims = []
        for place, row in enumerate(text["claims"]):
            kind = KINDS[row.pop("kind")]
            own = {key.partition(".")[2]: value for key, value in tensors.items() if key.partition(".")[0] == str(place)}
            plain = {key: tuple(value) if isinstance(value, list) else value for key, value in row.items()}
            claims.append(kind(**plain, **own))
        return Outcome(claims=tuple(claims), status=text["status"], message=text["message"], seconds=text["seconds"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CaptureError(f"{folder}: the stored claims are damaged ({error}); delete the folder and attack again") from error
