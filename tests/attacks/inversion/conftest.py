"""A cache of each test's own, and updates that pass defences on their way."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv.capture import Capture
from flpriv.defense import Local
from flpriv.registry import create
from flpriv.state import State, add


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing learned in one test is found in another, or in the user's own cache."""
    monkeypatch.setenv("FLPRIV_CACHE", str(tmp_path / "cache"))


def obfuscated(capture: Capture, *defenses: tuple[str, Mapping[str, Any]], known: bool = True, seed: int = 0) -> Capture:
    """The same capture of sites that use ``defenses``; where they are not ``known``, the adversary believes there are none."""
    rng = torch.Generator().manual_seed(seed)
    observations = []
    for seen in capture.observations:
        update: State = seen.update
        for name, options in defenses:
            update = create("defenses", name, options).protect(update, local=Local(site="site", round=seen.round, rng=rng))
        observations.append(replace(seen, returned=add(seen.sent, update), defenses=defenses if known else ()))
    return replace(capture, observations=tuple(observations))


@pytest.fixture(name="obfuscated")
def obfuscated_fixture() -> Callable[..., Capture]:
    return obfuscated
