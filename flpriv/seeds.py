"""Seeds from names: the same everywhere, whatever order things run in."""

from __future__ import annotations

import hashlib


def derive(seed: int, *parts: object) -> int:
    """A seed in [0, 2**63) that depends on ``seed`` and the text of every part."""
    text = "/".join(str(part) for part in (seed, *parts))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
