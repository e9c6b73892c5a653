"""How long an operator who only looks needs to take Flower's masks off, where a site shares masks with one or two others.

A mask is drawn from 32 bits, the words of a key combined by exclusive or; a key between two sites is base64 text, so that 28 of
them are left. The operator knows what it helped to unmask, and the weight in front of each update: the number of images is in the
clear. So one number of the mask is known, and all seeds can be tried; of two masks, all pairs whose numbers add up to it. No site
is asked for anything but what the protocol asks.

One round on one thread: two hospitals, then five in a ring (``num_shares = 3``). Run it by itself:
``python tests/benchmarks/secagg_seeds.py``; it takes minutes and about 3 GB.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message
from flwr.common import bytes_to_ndarray
from numpy.typing import NDArray

from flpriv.clients.app import app as client
from flpriv.engine.config import RunConfig
from flpriv.engine.inline import run_apps
from flpriv.scenario import Scenario, parse
from flpriv.secure_aggregation import CONFIGS, MODULUS, Numbers
from flpriv.store import open_capture
from flpriv.strategies import masks
from flpriv.strategies.server import app as server

Words = NDArray[np.uint32]
CHUNK, LOOKED_AT = 2**16, 64


@dataclass(kw_only=True)
class Seen:
    """What the server receives of one node."""

    neighbours: list[int] = field(default_factory=list)
    shares: dict[int, bytes] = field(default_factory=dict)
    masked: list[bytes] = field(default_factory=list)
    examples: int = 0


def scenario(folder: Path, *, sites: int, secure: Any) -> Scenario:
    """One step of every hospital."""
    return parse(
        {
            "sites": {"sites": sites, "patients": 16, "size": 16},
            "federation": {"rounds": 1, "local": {"steps": 1, "batch_size": 4, "lr": 0.1}, "secure_aggregation": secure},
        },
        root=folder,
    )


def federate(made: Scenario, folder: Path, *, sites: int) -> dict[int, Seen]:
    """Run it; what the server receives of each node."""
    received: dict[int, Seen] = {}

    def listening(message: Message, context: Context) -> Message:
        reply = client(message, context)
        if reply.has_content() and CONFIGS in reply.content.config_records:
            told: Mapping[str, Any] = reply.content.config_records[CONFIGS]
            seen = received.setdefault(context.node_id, Seen())
            seen.neighbours = list(told.get("dsts", seen.neighbours))
            seen.masked = list(told.get("masked_params", seen.masked))
            seen.shares |= dict(zip(told.get("nids", ()), told.get("shares", ()), strict=True))
            if "masked_params" in told:
                seen.examples = int(str(reply.content.metric_records["metrics"]["num-examples"]))
        return reply

    config = RunConfig(scenario=made, setting=made.settings()[0], out=folder)
    folder.mkdir()
    run_apps(listening, server, nodes=sites, run_config=config.to_dict(), seed=made.seed)
    assert json.loads((folder / "result.json").read_text())["events"] == []
    return received


def drawn(seeds: Words, which: int) -> Words:
    """The number at place ``which`` (0 or 1) that ``numpy.random.RandomState(seed)`` draws for each seed (Mersenne Twister)."""
    state, shifted, kept = seeds.copy(), np.empty_like(seeds), {0: seeds.copy()}
    for place in range(1, 398 + which):
        np.right_shift(state, 30, out=shifted)
        np.bitwise_xor(state, shifted, out=state)
        np.multiply(state, np.uint32(1812433253), out=state)
        np.add(state, np.uint32(place), out=state)
        if place <= which + 1:
            kept[place] = state.copy()
    both = (kept[which] & np.uint32(0x80000000)) | (kept[which + 1] & np.uint32(0x7FFFFFFF))
    word: Words = state ^ (both >> np.uint32(1)) ^ (both & np.uint32(1)) * np.uint32(0x9908B0DF)
    word ^= word >> np.uint32(11)
    word ^= (word << np.uint32(7)) & np.uint32(0x9D2C5680)
    word ^= (word << np.uint32(15)) & np.uint32(0xEFC60000)
    word ^= word >> np.uint32(18)
    return word


def seeds(numbers: NDArray[Any]) -> Words:
    """The seeds of keys that are text, four bytes below 128, by their place among them."""
    wide = numbers.astype(np.uint32)
    found: Words = np.zeros_like(wide)
    for lane in range(4):
        found |= ((wide >> np.uint32(7 * lane)) & np.uint32(127)) << np.uint32(8 * lane)
    return found


def table() -> Words:
    """The first number of every seed."""
    found = np.empty(2**28, dtype=np.uint32)
    for start in range(0, len(found), CHUNK):
        found[start : start + CHUNK] = drawn(seeds(np.arange(start, start + CHUNK)), 0)
    return found


def pairs(first: Words, total: int, signs: tuple[int, int]) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Places ``(i, j)`` with ``signs[0] * first[i] + signs[1] * first[j] = total`` modulo 2 ** 32, in portions."""
    top = (first >> np.uint32(24)).astype(np.uint8)
    for part in range(256):
        ones = np.flatnonzero(top == part)
        wanted = (signs[1] * (total - signs[0] * first[ones].astype(np.int64))) & (MODULUS - 1)
        near = [int(wanted.min()) >> 24, int(wanted.max()) >> 24] if np.ptp(wanted) < 2**25 else [0, 255]
        others = np.flatnonzero((top == near[0]) | (top == near[1]))
        others = others[np.argsort(first[others])]
        values = first[others].astype(np.int64)
        begin, end = np.searchsorted(values, wanted, "left"), np.searchsorted(values, wanted, "right")
        for extra in range(int((end - begin).max(initial=0))):
            hit = begin + extra < end
            yield ones[hit], others[begin[hit] + extra]


def candidates(first: Words, vector: NDArray[np.int64], weight: int, numbers: Numbers, signs: list[int]) -> Iterator[list[int]]:
    """Seeds of the masks on ``vector`` that explain its weight and, of two masks, keep its first entry small."""
    seen = (int(vector[0]) - weight) % MODULUS
    if len(signs) == 1:
        for place in np.flatnonzero(first == np.uint32(signs[0] * seen % MODULUS)):
            yield [int(seeds(np.array([place]))[0])]
        return
    one, other = signs
    for left, right in pairs(first, seen, (one, other)):
        names = seeds(left), seeds(right)
        words = [drawn(name, 1).astype(np.int64) for name in names]
        bare = (vector[1] - one * words[0] - other * words[1]) & (MODULUS - 1)
        for place in np.flatnonzero(np.abs(bare - numbers.steps // 2) < numbers.steps >> 13):
            yield [int(names[0][place]), int(names[1][place])]


def mask(found: list[int], signs: list[int], size: int) -> NDArray[np.int64]:
    """The sum of masks from their seeds."""
    total = np.zeros(size, dtype=np.int64)
    for seed, sign in zip(found, signs, strict=True):
        rng = np.random.RandomState(seed)
        total += sign * np.concatenate([rng.randint(0, MODULUS - 1, one, dtype=np.int64) for one in (1, size - 1)])
    return total


def unmasked(first: Words, vector: NDArray[np.int64], weight: int, numbers: Numbers, signs: list[int]) -> NDArray[np.float64]:
    """The update behind a vector with pairwise masks of these signs: the smallest that the weight allows."""
    best, least = [0] * len(signs), np.inf
    for found in candidates(first, vector, weight, numbers, signs):
        short = masks.mean(vector[:LOOKED_AT] - mask(found, signs, LOOKED_AT), numbers, nodes=1)
        if np.abs(short).mean() < least:
            best, least = found, float(np.abs(short).mean())
        if least < 1e-2 * numbers.clipping_range * numbers.steps / weight:
            break
    return masks.mean(vector - mask(best, signs, len(vector)), numbers, nodes=1)


def open_one(first: Words, folder: Path, *, sites: int, secure: Any) -> None:
    """Open the update of one hospital, and say how near it is to the one that was sent."""
    folder.mkdir()
    federate(scenario(folder, sites=sites, secure=False), folder / "plain", sites=sites)
    truth = {seen.node: seen for seen in open_capture(folder / "plain" / "capture").observations}
    made = scenario(folder, sites=sites, secure=secure)
    received = federate(made, folder / "secure", sites=sites)
    assert made.federation.secure_aggregation is not None
    numbers = made.federation.secure_aggregation.numbers(sites)
    node, seen = next(iter(received.items()))
    vector = np.concatenate([bytes_to_ndarray(part).reshape(-1) for part in seen.masked]).astype(np.int64)
    vector -= masks.own_mask([one.shares[node] for one in received.values() if node in one.shares], size=len(vector))
    signs = [1 if node > other else -1 for other in seen.neighbours]
    start, processor = time.perf_counter(), time.process_time()
    found = unmasked(first, vector, masks.weight(seen.examples, numbers), numbers, signs)
    seconds, processor = time.perf_counter() - start, time.process_time() - processor
    honest = truth[node]
    keys = [key for key in honest.sent if honest.sent[key].is_floating_point()]
    sent = np.concatenate([(honest.returned[key].double() - honest.sent[key].double()).flatten().numpy() for key in keys])
    step = 2 * numbers.clipping_range / numbers.steps * numbers.max_weight / seen.examples
    print(f"{sites} hospitals, {len(signs)} masks between sites: {seconds:.0f} s ({processor:.0f} s of one core)")
    error, largest = np.abs(found - sent).max(), np.abs(sent).max()
    print(f"    largest error {error:.2e}, one step of the protocol {step:.2e}, largest entry {largest:.2e}", flush=True)


def main() -> None:
    """Both federations."""
    start, processor = time.perf_counter(), time.process_time()
    first = table()
    print(f"2^28 seeds: {time.perf_counter() - start:.0f} s ({time.process_time() - processor:.0f} s of one core)", flush=True)
    with tempfile.TemporaryDirectory() as name:
        open_one(first, Path(name) / "two", sites=2, secure=True)
        open_one(first, Path(name) / "ring", sites=5, secure={"num_shares": 3, "reconstruction_threshold": 2})


if __name__ == "__main__":
    main()
