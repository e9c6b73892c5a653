"""What a killed federation needs to go on: model, random state, the strategy's own arrays, and what happened so far."""

from __future__ import annotations

import base64
import json
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from flpriv.errors import CaptureError
from flpriv.files import private_folder
from flpriv.finding import Event
from flpriv.store import StoredState, read_json, write_json, write_tensors

Metrics = dict[str, Any]
"""Metric name to a number, or a list of numbers."""


@dataclass(kw_only=True)
class History:
    """What a federation did so far.

    Args:
        train: round to the strategy's aggregated training metrics.
        evaluate: round to its aggregated evaluation metrics.
        central: round to what the server's own evaluation gave, 0 before the first.
        events: dropouts, refusals, replies left out.
    """

    train: dict[int, Metrics] = field(default_factory=dict)
    evaluate: dict[int, Metrics] = field(default_factory=dict)
    central: dict[int, Metrics] = field(default_factory=dict)
    events: list[Event] = field(default_factory=list)


def save(folder: Path, *, round: int, arrays: ArrayRecord, strategy: Strategy, history: History) -> None:
    """Write the checkpoint of a round (``round-0001.safetensors``, then ``.json``) and remove the one before it.

    Kept are the random states of ``random`` and numpy, and those attributes of the strategy that are arrays, numbers or
    containers of them; callables are its configuration, and others are named in the checkpoint as lost.

    Raises:
        CaptureError: if the disk is full or the folder cannot be written to.
    """
    private_folder(folder)
    tensors = {f"model/{key}": torch.from_numpy(array.numpy()) for key, array in arrays.items()}
    kept, lost = _attributes(strategy, "strategy", tensors)
    write_tensors(folder / f"round-{round:04d}.safetensors", tensors)
    facts = {"round": round, "model": list(arrays), "random": random.getstate(), "numpy": _numpy_state()}
    facts |= {"strategy": kept, "lost": lost, "history": _history_to_json(history)}
    write_json(folder / f"round-{round:04d}.json", facts)
    for path in _checkpoints(folder)[:-1]:
        path.unlink()
        path.with_suffix(".safetensors").unlink(missing_ok=True)


def load(folder: Path, strategy: Strategy) -> tuple[int, ArrayRecord, History] | None:
    """Bring ``strategy`` and the random states back to the last checkpoint.

    Returns:
        Its round, the global model and the history; ``None`` if there is no checkpoint.

    Raises:
        CaptureError: naming the file that cannot be read.
    """
    found = _checkpoints(folder)
    if not found:
        return None
    path = found[-1]
    facts, tensors = read_json(path), StoredState(path.with_suffix(".safetensors"))
    try:
        arrays = _record(facts["model"], "model", tensors)
        _restore(strategy, facts["strategy"], tensors)
        history = _history_from_json(facts["history"])
        version, words, gauss = facts["random"]
        random.setstate((version, tuple(words), gauss))
        np.random.set_state(facts["numpy"])  # noqa: NPY002
    except (KeyError, TypeError, ValueError) as error:
        raise CaptureError(f"{path}: not a checkpoint of this federation ({error}); remove the folder to start anew") from error
    for name in facts["lost"]:
        what = f"the strategy's attribute {name!r} is not part of a checkpoint and starts afresh after round {facts['round']}"
        history.events.append(Event(round=facts["round"], who="server", what=what))
    return int(facts["round"]), arrays, history


def _checkpoints(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("round-*.json") if re.fullmatch(r"round-\d{4,}\.json", path.name)]
    return sorted(found, key=lambda path: int(path.stem.removeprefix("round-")))


def _attributes(strategy: Strategy, where: str, tensors: dict[str, Tensor]) -> tuple[dict[str, Any], list[str]]:
    kept, lost = {}, []
    for name, value in vars(strategy).items():
        try:
            kept[name] = _encode(value, f"{where}/{name}", tensors)
        except TypeError:
            if not callable(value):
                lost.append(f"{where}.{name}".removeprefix("strategy."))
    return kept, lost


def _encode(value: Any, where: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """``value`` as JSON, arrays moved to ``tensors`` under ``where``; a ``TypeError`` for anything that is not plain data."""
    if isinstance(value, float):
        return {"is": "float", "value": value.hex()}
    if value is None or isinstance(value, str | int):
        return {"is": "plain", "value": value}
    if isinstance(value, bytes):
        return {"is": "bytes", "value": base64.b64encode(value).decode()}
    if isinstance(value, np.ndarray | np.generic):
        tensors[where] = torch.from_numpy(np.array(value))
        return {"is": "array"}
    if isinstance(value, Tensor):
        tensors[where] = value
        return {"is": "tensor"}
    if isinstance(value, ArrayRecord):
        tensors |= {f"{where}/{key}": torch.from_numpy(array.numpy()) for key, array in value.items()}
        return {"is": "record", "keys": list(value)}
    if isinstance(value, Strategy):
        kept, lost = _attributes(value, where, tensors)
        return {"is": "strategy", "attributes": kept, "lost": lost}
    if isinstance(value, dict) and all(isinstance(key, str | int) for key in value):
        items = [[key, _encode(item, f"{where}/{key}", tensors)] for key, item in value.items()]
        return {"is": "dict", "items": items}
    if isinstance(value, list | tuple):
        items = [[place, _encode(item, f"{where}/{place}", tensors)] for place, item in enumerate(value)]
        return {"is": type(value).__name__, "items": items}
    raise TypeError(type(value).__name__)


def _decode(facts: Mapping[str, Any], where: str, tensors: Mapping[str, Tensor]) -> Any:
    kind = facts["is"]
    if kind in ("dict", "list", "tuple"):
        items = {key: _decode(item, f"{where}/{key}", tensors) for key, item in facts["items"]}
        return items if kind == "dict" else list(items.values()) if kind == "list" else tuple(items.values())
    if kind in ("array", "tensor"):
        tensor = tensors[where].clone()
        return tensor if kind == "tensor" else tensor.numpy()
    if kind == "record":
        return _record(facts["keys"], where, tensors)
    if kind == "float":
        return float.fromhex(facts["value"])
    return base64.b64decode(facts["value"]) if kind == "bytes" else facts["value"]


def _restore(strategy: Strategy, kept: Mapping[str, Any], tensors: Mapping[str, Tensor], where: str = "strategy") -> None:
    for name, facts in kept.items():
        if name not in vars(strategy):
            raise ValueError(f"{type(strategy).__name__} has no attribute {name!r}")
        if facts["is"] == "strategy":
            _restore(getattr(strategy, name), facts["attributes"], tensors, f"{where}/{name}")
        else:
            setattr(strategy, name, _decode(facts, f"{where}/{name}", tensors))


def _record(keys: list[str], where: str, tensors: Mapping[str, Tensor]) -> ArrayRecord:
    return ArrayRecord({key: Array(tensors[f"{where}/{key}"].numpy()) for key in keys})


def _numpy_state() -> dict[str, Any]:
    """The state behind ``numpy.random``, which Flower's own strategies draw noise from."""
    state: dict[str, Any] = dict(np.random.get_state(legacy=False))  # noqa: NPY002
    return state | {"state": {"key": state["state"]["key"].tolist(), "pos": state["state"]["pos"]}}


def _history_to_json(history: History) -> dict[str, Any]:
    events = [asdict(event) for event in history.events]
    return {"metrics": json.dumps([history.train, history.evaluate, history.central]), "events": events}


def _history_from_json(facts: Mapping[str, Any]) -> History:
    train, evaluate, central = ({int(key): value for key, value in one.items()} for one in json.loads(facts["metrics"]))
    events = [Event(round=int(event["round"]), who=str(event["who"]), what=str(event["what"])) for event in facts["events"]]
    return History(train=train, evaluate=evaluate, central=central, events=events)
