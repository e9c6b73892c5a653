"""An update that a trap has made out to be few images', handed on to any attack that inverts updates."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from flpriv.attack import Attack
from flpriv.capture import Capture, Observation
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.registry import create
from flpriv.threat import Can


def invert(
    capture: Capture, seen: Observation, *, then: str, options: Mapping[str, Any], rng: torch.Generator, who: str
) -> list[Reconstruction]:
    """What the attack called ``then`` claims of one update, as if an honest node had sent it.

    Args:
        capture: of the trap; its task, models and public images are shared.
        seen: the isolated update. Claims are about its round and node, which may be ``None``.
        then: a registered attack that reconstructs images.
        options: of that attack; ``rounds`` is its first.
        rng: its seed is drawn from here.
        who: name of the attack that set the trap, for messages.

    Raises:
        FlprivError: if ``then`` is no attack on single updates.
    """
    attack: Attack = create("attacks", then, options, files=map(Path, capture.task.plugins))
    if attack.needs & Can.TAMPER or Can.SEE_UPDATES not in attack.needs:
        raise FlprivError(f"{who}: then = {then!r} does not invert single updates; name one that does, such as 'tuned-matching'")
    alone = replace(seen, round=1, node=0 if seen.node is None else seen.node, trap="", metrics={})
    granted = capture.granted | Can.SEE_UPDATES | (Can.KNOW_LABELS if seen.labels is not None else Can(0))
    given = replace(capture, granted=granted & ~Can.TAMPER, observations=(alone,), secrets={})
    claims: Sequence[object] = attack(given, seed=int(torch.randint(2**31, (1,), generator=rng)))
    found = [claim for claim in claims if isinstance(claim, Reconstruction)]
    return [replace(claim, round=seen.round, node=seen.node) for claim in found]
