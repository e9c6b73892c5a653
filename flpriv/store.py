"""Captures on disk: safetensors and JSON, readable without flpriv, written so that a finished round is never half there.

Layout of a capture folder::

    capture.json                       format, granted capabilities, task, local recipe, defences
    initial.safetensors                the global model before round 1 (with see-models)
    round-0001/sent-<hash>.safetensors      a model that was sent; once, however many nodes received it
    round-0001/node-<id>.safetensors        what a node returned (with see-updates, or opened by a trap)
    round-0001/sum.safetensors              the sum over all clients, where that is what is seen
    round-0001/global.safetensors           the global model after the round (with see-models)
    round-0001/round.json                   written last: the round is complete
    final.safetensors                  the last global model (with see-final)
    secrets.safetensors                what the operator's trap kept for its read-out
    public.safetensors …               side knowledge, with public.json for the columns
    canaries.safetensors               all canaries, in or not, with canaries.json for the rest
    labels.safetensors                 labels behind each update, one entry "round/node" each

Folders are 0700 and files 0600: reconstructions from them are patient images.
"""

from __future__ import annotations

import json
import math
import re
import shutil
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from flpriv.canary import Canaries
from flpriv.capture import Capture, Observation
from flpriv.errors import CaptureError, FlprivError
from flpriv.files import private_folder, write_private
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import validate
from flpriv.state import State, fingerprint
from flpriv.task import Task
from flpriv.threat import Can, capability, spell

FORMAT = 1
"""Version of the layout; a reader refuses a newer one."""

T = TypeVar("T")
Knowledge = Literal["public", "candidates", "exposed"]

_KNOWLEDGE: Mapping[Knowledge, tuple[Can, tuple[str, ...]]] = {
    "public": (Can.KNOW_PUBLIC, ()),
    "candidates": (Can.KNOW_CANDIDATES, ()),
    "exposed": (Can.KNOW_EXPOSED, ("site", "sex", "age")),
}
_MAX_HEADER = 16 * 2**20
_MAX_JSON = 64 * 2**20
_TENSOR_FILE = re.compile(r"(sent-[0-9a-f]{1,64}|node-\d{1,20}|sum|global)\.safetensors")
_ROUND = re.compile(r"round-(\d{4,})")


class StoredState(Mapping[str, Tensor]):
    """A model state on disk, in the order it was written; each tensor is read when it is asked for, anew each time.

    Writing to a tensor changes neither the file nor what the next look-up gives.

    Raises:
        CaptureError: if the file is missing, truncated, or not a safetensors file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self.layout = _header(path)
        """Entry to its dtype and shape, as in the file's header."""

    def __getitem__(self, key: str) -> Tensor:
        if key not in self.layout:
            raise KeyError(key)
        tensor: Tensor = self._file.get_tensor(key)
        return tensor.clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self.layout)

    def __len__(self) -> int:
        return len(self.layout)

    def __repr__(self) -> str:
        return f"StoredState({str(self._path)!r})"

    def __reduce__(self) -> tuple[type[StoredState], tuple[Path]]:
        return StoredState, (self._path,)

    @cached_property
    def _file(self) -> Any:
        return _open(self._path)


class Sink:
    """Writes a capture, leaving out before disk what the threat model does not grant.

    A reply comes with the model it answers: whoever sees updates sees what was sent. A reply that no attack could read (NaN
    values, other layers) is not stored; the wiretap's events tell of it.

    Args:
        folder: of the capture; made if missing.
        granted: the adversary's capabilities.
        task: what the federation learns; without it, the reader of the capture must bring one.
        local: the local recipe, stored with ``Can.KNOW_LOCAL``.
        defenses: (name, options) of the sites' defences in order, stored with ``Can.KNOW_DEFENSES``; ``None`` where the operator
            does not know them.
        resume: go on with the capture that is there.

    Raises:
        CaptureError: if the folder holds a capture already and ``resume`` is not set, or cannot be written to.
    """

    def __init__(
        self,
        folder: Path | str,
        *,
        granted: Can,
        task: Task | None = None,
        local: LocalRecipe | None = None,
        defenses: Sequence[tuple[str, Mapping[str, Any]]] | None = None,
        resume: bool = False,
    ) -> None:
        self.folder = Path(folder)
        self.granted = granted
        self._observed: list[dict[str, Any]] = []
        self._sent: dict[int, tuple[State, str]] = {}
        if not resume and (self.folder / "capture.json").exists():
            raise CaptureError(f"{self.folder} holds a capture already; choose another folder, or resume")
        private_folder(self.folder)
        known = asdict(local) if local is not None and Can.KNOW_LOCAL in granted else None
        stack = _plain(defenses) if defenses is not None and Can.KNOW_DEFENSES in granted else None
        facts = {"format": FORMAT, "granted": spell(granted).split(", ") if granted else [], "local": known, "defenses": stack}
        write_json(self.folder / "capture.json", facts | {"task": asdict(task) if task is not None else None})

    def initial(self, model: State) -> None:
        """Store the global model before round 1."""
        if Can.SEE_MODELS in self.granted:
            write_tensors(self.folder / "initial.safetensors", model)

    def observe(self, seen: Observation) -> None:
        """Store one reply (if a trap opened it, with ``Can.TAMPER``), or one sum over clients (with the models alone)."""
        needed = Can.SEE_MODELS if seen.node is None else Can.TAMPER if seen.opened else Can.SEE_UPDATES
        if needed not in self.granted:
            return
        folder = self._round(seen.round)
        returned = "sum.safetensors" if seen.node is None else f"node-{seen.node}.safetensors"
        sent = self._store_sent(folder, seen.sent)
        write_tensors(folder / returned, seen.returned)
        metrics = {key: float(value) if math.isfinite(value) else None for key, value in seen.metrics.items()}
        facts = {"node": seen.node, "sent": sent, "returned": returned, "examples": seen.examples, "metrics": metrics}
        self._observed.append(facts | {"trap": seen.trap, "nodes": list(seen.nodes), "opened": seen.opened})

    def finish_round(self, round: int, *, model: State) -> None:
        """Store the global model after the round and mark the round as complete."""
        folder = self._round(round)
        if Can.SEE_MODELS in self.granted:
            write_tensors(folder / "global.safetensors", model)
        write_json(folder / "round.json", {"round": round, "observations": self._observed})
        self._observed, self._sent = [], {}

    def finish(self, model: State) -> None:
        """Store the last global model."""
        if Can.SEE_FINAL in self.granted:
            write_tensors(self.folder / "final.safetensors", model)

    def keep(self, secrets: State) -> None:
        """Store what the operator's trap kept for its read-out."""
        if secrets:
            write_tensors(self.folder / "secrets.safetensors", secrets)

    def discard_after(self, round: int) -> None:
        """Remove every later round, and what an interrupted one left behind."""
        for path in self.folder.iterdir():
            if (match := _ROUND.fullmatch(path.name)) and int(match[1]) > round:
                shutil.rmtree(path)
            elif path.name.startswith("."):
                path.unlink()

    def _round(self, round: int) -> Path:
        folder = self.folder / f"round-{round:04d}"
        private_folder(folder)
        return folder

    def _store_sent(self, folder: Path, sent: State) -> str:
        if id(sent) not in self._sent:
            name = f"sent-{fingerprint(sent)}.safetensors"
            if not (folder / name).exists():
                write_tensors(folder / name, sent)
            self._sent[id(sent)] = (sent, name)
        return self._sent[id(sent)][1]


def open_capture(folder: Path | str, *, task: Task | None = None) -> Capture:
    """Read a capture; tensors stay on disk until they are looked at. Rounds that were not finished are left out.

    Args:
        folder: of the capture.
        task: used in place of the stored one. A capture never decides by itself which code is run: a stored task whose model is
            an import path is refused unless the reader brings the task.

    Raises:
        CaptureError: naming the file that is missing, truncated, foreign or of a newer format, and the way out.
    """
    folder = Path(folder)
    facts = _facts(folder)
    granted = _parsed(folder / "capture.json", lambda: _flags(facts["granted"]))
    local = _parsed(folder / "capture.json", lambda: _recipe(facts["local"]))
    defenses = _parsed(folder / "capture.json", lambda: _stack(facts.get("defenses")))
    labels = StoredState(path) if (path := folder / "labels.safetensors").exists() else {}
    observations: list[Observation] = []
    models = [StoredState(path)] if (path := folder / "initial.safetensors").exists() else []
    for place in _finished(folder):
        observations += [replace(seen, local=local, defenses=defenses) for seen in _observations(place, labels)]
        models += [StoredState(path)] if (path := place / "global.safetensors").exists() else []
    if not models and (path := folder / "final.safetensors").exists():
        models = [StoredState(path)]
    return Capture(
        granted=granted,
        task=task or _stored_task(folder, facts),
        observations=tuple(observations),
        models=tuple(models),
        public=_knowledge(folder, "public"),
        candidates=_knowledge(folder, "candidates"),
        exposed=_knowledge(folder, "exposed"),
        secrets=StoredState(path) if (path := folder / "secrets.safetensors").exists() else {},
        canaries=_canaries(folder),
    )


def finished_rounds(folder: Path | str) -> tuple[int, ...]:
    """The rounds that are complete in a capture folder, in order; empty if there is no such folder."""
    return tuple(int(path.name.removeprefix("round-")) for path in _finished(Path(folder)))


def write_knowledge(folder: Path | str, what: Knowledge, records: Records) -> None:
    """Store images the adversary holds, if the threat model grants them, without ids or patients.

    Of exposed records the attributes ``"site"``, ``"sex"`` and ``"age"`` are kept, of all others none.

    Raises:
        CaptureError: if ``folder`` is no capture, or cannot be written to.
    """
    folder = Path(folder)
    needed, kept = _KNOWLEDGE[what]
    if needed not in _flags(_facts(folder)["granted"]):
        return
    bare = records.anonymous(keep=kept)
    write_tensors(folder / f"{what}.safetensors", {"images": bare.images, "labels": bare.labels})
    write_json(folder / f"{what}.json", {"attributes": {key: list(column) for key, column in bare.attributes.items()}})


def write_canaries(folder: Path | str, canaries: Canaries) -> None:
    """Store canaries, which whoever audits holds under any threat model; nothing stored tells which were in.

    Raises:
        CaptureError: if ``folder`` is no capture, or cannot be written to.
    """
    folder = Path(folder)
    _facts(folder)
    records, seeds = canaries.records, canaries.seeds
    tensors = {"seeds": seeds} if records is None else {"images": records.images, "labels": records.labels}
    write_tensors(folder / "canaries.safetensors", {key: value for key, value in tensors.items() if value is not None})
    write_json(folder / "canaries.json", {"norm": canaries.norm, "level": canaries.level, "nodes": list(canaries.nodes)})


def write_labels(folder: Path | str, labels: Mapping[tuple[int, int], Tensor]) -> None:
    """Store the labels behind each update, ``(round, node)`` to ``(N,)`` in order of use, if the threat model grants them.

    They are sorted unless the order is granted too.

    Raises:
        CaptureError: if ``folder`` is no capture, or cannot be written to.
    """
    folder = Path(folder)
    granted = _flags(_facts(folder)["granted"])
    if Can.KNOW_LABELS not in granted:
        return
    ordered = Can.KNOW_ORDER in granted
    rows = {f"{round}/{node}": value.long() if ordered else value.long().sort().values for (round, node), value in labels.items()}
    write_tensors(folder / "labels.safetensors", rows)


def write_json(path: Path, value: Any) -> None:
    """Write JSON whole or not at all, for its owner alone. NaN is refused, so that any reader can parse it.

    Raises:
        CaptureError: if the disk is full or the folder cannot be written to.
    """
    write_private(path, json.dumps(value, allow_nan=False, indent=1).encode())


def write_tensors(path: Path, state: State) -> None:
    """Write tensors as safetensors whole or not at all, for its owner alone; the order of entries is kept in the metadata.

    Raises:
        CaptureError: if the disk is full or the folder cannot be written to.
    """
    plain = {key: value.detach().cpu().contiguous().clone() for key, value in state.items()}
    write_private(path, save(plain, metadata={"order": json.dumps(list(state))}))


def read_json(path: Path) -> Any:
    """Read JSON of at most 64 MiB.

    Raises:
        CaptureError: if the file is missing, too large or not JSON.
    """
    _check_file(path)
    if path.stat().st_size > _MAX_JSON:
        raise CaptureError(f"{path}: larger than {_MAX_JSON >> 20} MiB; this is no file of a capture")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CaptureError(f"{path}: not JSON ({type(error).__name__}); {_WAY_OUT}") from error


_WAY_OUT = "copy the capture again, or run the federation anew"


def _facts(folder: Path) -> dict[str, Any]:
    path = folder / "capture.json"
    if not path.exists():
        raise CaptureError(f"{folder} is not a capture: it has no capture.json")
    facts = read_json(path)
    if not isinstance(facts, dict) or not isinstance(facts.get("format"), int):
        raise CaptureError(f"{path}: not written by flpriv; {_WAY_OUT}")
    if facts["format"] > FORMAT:
        raise CaptureError(
            f"{path}: format {facts['format']} is newer than {FORMAT}, the newest this flpriv reads; update flpriv"
        )
    return facts


def _flags(names: Sequence[str]) -> Can:
    granted = Can(0)
    for name in names:
        granted |= capability(name)
    return granted


def _recipe(facts: Mapping[str, Any] | None) -> LocalRecipe | None:
    return validate(LocalRecipe, facts, where="local") if facts is not None else None


def _plain(defenses: Sequence[tuple[str, Mapping[str, Any]]]) -> list[list[Any]]:
    """Defences as JSON; an infinite option becomes ``"inf"``."""
    return [[name, {key: _spelt(value) for key, value in options.items()}] for name, options in defenses]


def _spelt(value: Any) -> Any:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _stack(facts: Sequence[Any] | None) -> tuple[tuple[str, Mapping[str, Any]], ...] | None:
    if facts is None:
        return None
    infinite = {str(value): value for value in (math.inf, -math.inf)}

    def value(given: Any) -> Any:
        return infinite.get(given, given) if isinstance(given, str) else given

    return tuple((str(name), {str(key): value(given) for key, given in options.items()}) for name, options in facts)


def _stored_task(folder: Path, facts: Mapping[str, Any]) -> Task:
    path = folder / "capture.json"
    if facts.get("task") is None:
        raise CaptureError(f"{path}: the capture says nothing of the task; open it with a task")
    task: Task = _parsed(path, lambda: _task(facts["task"]))
    if ":" in task.model or task.plugins:
        raise CaptureError(f"{path}: the model {task.model!r} is code; to trust it, open the capture with a task of your own")
    return task


def _task(facts: Mapping[str, Any]) -> Task:
    tuples = {
        "shape": tuple(map(int, facts["shape"])),
        "classes": tuple(map(str, facts["classes"])),
        "plugins": tuple(facts.get("plugins", ())),
    }
    changes = tuple((str(name), dict(options)) for name, options in facts["changes"])
    return Task(**{**facts, **tuples, "changes": changes, "model": str(facts["model"]), "options": dict(facts["options"])})


def _finished(folder: Path) -> list[Path]:
    found = [path for path in folder.glob("round-*") if _ROUND.fullmatch(path.name) and (path / "round.json").exists()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("round-")))


def _observations(place: Path, labels: State) -> list[Observation]:
    path = place / "round.json"
    facts = read_json(path)

    def found() -> list[Observation]:
        rows = sorted(facts["observations"], key=lambda row: -1 if row["node"] is None else int(row["node"]))
        return [_observation(place, facts["round"], row, labels) for row in rows]

    return _parsed(path, found)


def _observation(place: Path, round: int, row: Mapping[str, Any], labels: State) -> Observation:
    sent, returned = _state(place, row["sent"]), _state(place, row["returned"])
    for key in [key for key in sent.layout if returned.layout.get(key, ("", ()))[1] != sent.layout[key][1]][:1]:
        raise CaptureError(f"{place / row['returned']}: layer {key!r} differs from {row['sent']}; {_WAY_OUT}")
    node = None if row["node"] is None else int(row["node"])
    return Observation(
        round=int(round),
        node=node,
        sent=sent,
        returned=returned,
        examples=None if row["examples"] is None else int(row["examples"]),
        metrics={str(key): math.nan if value is None else float(value) for key, value in row["metrics"].items()},
        labels=labels.get(f"{round}/{node}"),
        trap=str(row["trap"]),
        nodes=tuple(map(int, row.get("nodes", ()))),
        opened=bool(row.get("opened", False)),
    )


def _state(place: Path, name: str) -> StoredState:
    if not _TENSOR_FILE.fullmatch(name):
        raise CaptureError(f"{place / 'round.json'}: {name!r} is no file of a capture; {_WAY_OUT}")
    return StoredState(place / name)


def _knowledge(folder: Path, what: Knowledge) -> Records | None:
    path = folder / f"{what}.json"
    if not path.exists():
        return None
    facts, tensors = read_json(path), folder / f"{what}.safetensors"
    layout, mapped = _header(tensors), _open(tensors)

    def records() -> Records:
        attributes = {str(key): tuple(map(str, column)) for key, column in facts["attributes"].items()}
        images, labels = mapped.get_tensor("images"), mapped.get_tensor("labels")
        if len(layout["labels"][1]) != 1 or {len(images), *map(len, attributes.values())} != {len(labels)}:
            raise ValueError("columns of different length")
        return Records(images=images, labels=labels, attributes=attributes)

    return _parsed(path, records)


def _canaries(folder: Path) -> Canaries | None:
    path = folder / "canaries.json"
    if not path.exists():
        return None
    facts, mapped = read_json(path), _open(folder / "canaries.safetensors")

    def found() -> Canaries:
        names = tuple(mapped.keys())
        seeds = mapped.get_tensor("seeds") if "seeds" in names else None
        records = Records(images=mapped.get_tensor("images"), labels=mapped.get_tensor("labels")) if seeds is None else None
        nodes = tuple(map(int, facts["nodes"]))
        return Canaries(records=records, seeds=seeds, norm=float(facts["norm"]), level=facts["level"], nodes=nodes)

    return _parsed(path, found)


def _parsed(path: Path, make: Callable[[], T]) -> T:
    """What ``make`` gives; whatever is wrong with the JSON it reads becomes an error that names ``path``."""
    try:
        return make()
    except CaptureError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RecursionError, FlprivError) as error:
        raise CaptureError(f"{path}: not as flpriv writes it ({type(error).__name__}: {error}); {_WAY_OUT}") from error


def _header(path: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Entries with dtype and shape in the order written, from the header alone; the whole file is checked against it."""
    _check_file(path)
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > _MAX_HEADER:
            raise CaptureError(f"{path}: a header of {length} bytes, more than the {_MAX_HEADER >> 20} MiB allowed; {_WAY_OUT}")
        raw = file.read(length)
    _open(path)

    def layout() -> dict[str, tuple[str, tuple[int, ...]]]:
        header = json.loads(raw)
        order = json.loads(header.pop("__metadata__", {}).get("order", "null"))
        entries = {str(key): (str(value["dtype"]), tuple(map(int, value["shape"]))) for key, value in header.items()}
        return entries if order is None or set(order) != set(entries) else {key: entries[key] for key in order}

    found: dict[str, tuple[str, tuple[int, ...]]] = _parsed(path, layout)
    return found


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CaptureError(f"{path}: truncated, or not a safetensors file ({error}); {_WAY_OUT}") from error


def _check_file(path: Path) -> None:
    try:
        plain = stat.S_ISREG(path.lstat().st_mode)
    except OSError as error:
        raise CaptureError(f"{path}: {error.strerror or error}; {_WAY_OUT}") from error
    if not plain:
        raise CaptureError(f"{path}: not a plain file; {_WAY_OUT}")
