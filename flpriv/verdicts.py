"""Verdicts on disk: readable JSON, arrays beside it in safetensors, both private to the user and written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flpriv.claim import Goal
from flpriv.errors import CaptureError
from flpriv.files import private_folder, write_private
from flpriv.finding import Confusion, Event, Finding, Group, Level, Metric, Pair, Roc, SettingResult, SiteSummary, Verdict

FILE = "verdict.json"
FORMAT = "flpriv-verdict"
VERSION = 1
_NUMBERS = ("value", "low", "high", "null", "second_null")
_ARRAYS = re.compile(r"verdict-[0-9a-f]{16}\.safetensors")

Place = Callable[[str, NDArray[Any]], Any]
"""Called with an array's place in the verdict (``"findings.0.roc.fpr"``) and the array; gives what stands there in JSON."""


def save(verdict: Verdict, folder: Path) -> Path:
    """Write ``verdict`` into ``folder`` and return its JSON file.

    The arrays (reconstructions, ROC curves, confusion counts) lie beside it in a file named after its own content, so an
    interrupted save leaves the earlier verdict whole. Folder 0700, files 0600: reconstructions are patient images.

    Raises:
        CaptureError: if the folder or a file cannot be written.
    """
    from safetensors.numpy import save as pack

    private_folder(folder)
    arrays: dict[str, NDArray[Any]] = {}

    def keep(place: str, array: NDArray[Any]) -> dict[str, str]:
        arrays[place] = np.ascontiguousarray(array)
        return {"array": place}

    table = plain(verdict, place=keep)
    packed = pack(arrays)
    beside = f"verdict-{hashlib.sha256(packed).hexdigest()[:16]}.safetensors"
    write_private(folder / beside, packed)
    content = {"format": FORMAT, "version": VERSION, "arrays": beside, "verdict": table}
    write_private(folder / FILE, (json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n").encode())
    for old in folder.glob("verdict-*.safetensors"):
        if old.name != beside and _ARRAYS.fullmatch(old.name):
            old.unlink(missing_ok=True)
    return folder / FILE


def load(folder: Path) -> Verdict:
    """The verdict that :func:`save` wrote into ``folder``.

    Raises:
        CaptureError: if there is none, if it is damaged, or if another version of flpriv wrote it.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    file = folder / FILE
    if not file.is_file():
        raise CaptureError(f"{folder}: no {FILE} there; audit first, or name the folder of a finished run")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["version"] != VERSION:
            raise CaptureError(f"{file}: written by another version of flpriv; attack the run again to renew it")
        if not _ARRAYS.fullmatch(content["arrays"]):
            raise ValueError(f"unexpected file of arrays {content['arrays']!r}")
        return _verdict(content["verdict"], load_file(folder / content["arrays"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, SafetensorError) as error:
        raise CaptureError(f"{file}: the verdict is damaged ({error}); attack the run again to renew it") from error


def plain(value: Any, *, place: Place, where: str = "") -> Any:
    """``value`` as plain JSON: dataclasses as tables, levels and goals in words, numbers that are not finite as text.

    Args:
        value: a verdict or any part of one.
        place: what to do with arrays.
        where: place of ``value`` within the whole.
    """
    inside = f"{where}." if where else ""
    if isinstance(value, Enum):
        return value.name.lower() if isinstance(value, Level) else value.value
    if is_dataclass(value):
        return {f.name: plain(getattr(value, f.name), place=place, where=inside + f.name) for f in fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item, place=place, where=f"{inside}{key}") for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [plain(item, place=place, where=f"{inside}{index}") for index, item in enumerate(value)]
    if isinstance(value, np.ndarray):
        return place(where, value)
    if isinstance(value, np.generic):
        return plain(value.item(), place=place, where=where)
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


Table = Mapping[str, Any]
Arrays = Mapping[str, NDArray[Any]]


def _verdict(table: Table, arrays: Arrays) -> Verdict:
    return Verdict(
        **{
            **table,
            "level": Level[table["level"].upper()],
            "adversary": tuple(table["adversary"]),
            "caveats": tuple(table["caveats"]),
            "methods": {name: (str(summary), str(paper)) for name, (summary, paper) in table["methods"].items()},
            "sites": tuple(SiteSummary(**site) for site in table["sites"]),
            "settings": tuple(_setting(setting) for setting in table["settings"]),
            "findings": tuple(_finding(finding, arrays) for finding in table["findings"]),
        }
    )


def _setting(table: Table) -> SettingResult:
    return SettingResult(
        **{
            **table,
            "utility": tuple(map(_metric, table["utility"])),
            "train_utility": tuple(map(_metric, table["train_utility"])),
            "armed_utility": tuple(map(_metric, table.get("armed_utility", ()))),
            "epsilon": {site: float(value) for site, value in table["epsilon"].items()},
            "seconds": float(table["seconds"]),
            "events": tuple(Event(**event) for event in table["events"]),
            "nodes": tuple(table.get("nodes", ())),
        }
    )


def _finding(table: Table, arrays: Arrays) -> Finding:
    return Finding(
        **{
            **table,
            "goal": Goal(table["goal"]),
            "level": Level[table["level"].upper()],
            "headline": table["headline"] and _metric(table["headline"]),
            "metrics": tuple(map(_metric, table["metrics"])),
            "caveats": tuple(table["caveats"]),
            "pairs": tuple(_pair(pair, arrays) for pair in table["pairs"]),
            "roc": table["roc"] and Roc(fpr=_array(table["roc"]["fpr"], arrays), tpr=_array(table["roc"]["tpr"], arrays)),
            "confusion": table["confusion"] and _confusion(table["confusion"], arrays),
            "groups": tuple(map(_group, table.get("groups", ()))),
            "seconds": float(table["seconds"]),
        }
    )


def _metric(table: Table) -> Metric:
    return Metric(**{**table, **{name: _number(table.get(name)) for name in _NUMBERS}})


def _group(table: Table) -> Group:
    return Group(**{**table, "auc": _metric(table["auc"]), "strict": _metric(table["strict"])})


def _pair(table: Table, arrays: Arrays) -> Pair:
    images = {name: _array(table[name], arrays) for name in ("original", "reconstruction", "null")}
    scores = {name: float(table[name]) for name in ("psnr", "ssim", "null_psnr", "null_ssim")}
    return Pair(**{**table, **images, **scores, "rdlv": _number(table.get("rdlv"))})


def _confusion(table: Table, arrays: Arrays) -> Confusion:
    return Confusion(
        classes=tuple(table["classes"]),
        counts=_array(table["counts"], arrays),
        accuracy=float(table["accuracy"]),
        baselines={name: float(value) for name, value in table["baselines"].items()},
    )


def _array(table: Table, arrays: Arrays) -> NDArray[Any]:
    return arrays[table["array"]]


def _number(value: Any) -> float | None:
    return None if value is None else float(value)
