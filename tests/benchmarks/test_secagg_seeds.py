"""What the search for Flower's mask seeds relies on: that generator, 28 bits of a key, and pairs that add up."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import generate_key_pairs

MODULUS = 2**32


@pytest.fixture(scope="module")
def search() -> dict[str, Any]:
    return runpy.run_path(str(Path(__file__).with_name("secagg_seeds.py")), run_name="search")


def test_numbers_are_those_of_numpy(search: dict[str, Any]) -> None:
    seeds = np.random.default_rng(0).integers(0, MODULUS, 50, dtype=np.uint32)
    for place in (0, 1):
        expected = [np.random.RandomState(seed).randint(0, MODULUS - 1, 2, dtype=np.int64)[place] for seed in seeds]
        assert search["drawn"](seeds, place).tolist() == expected


def test_the_mask_of_a_real_key_is_among_those_tried(search: dict[str, Any]) -> None:
    (private, _), (_, public) = generate_key_pairs(), generate_key_pairs()
    key = generate_shared_key(private, public)
    lanes = [0, 0, 0, 0]
    for place, byte in enumerate(key):
        lanes[place % 4] ^= byte
    assert all(lane < 128 for lane in lanes)
    number = sum(lane << 7 * place for place, lane in enumerate(lanes))
    seed = int(search["seeds"](np.array([number]))[0])
    ours, theirs = (search["mask"]([seed], [1], 9), np.concatenate(pseudo_rand_gen(key, MODULUS, [(1,), (8,)])))
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("signs", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_all_pairs_that_add_up_are_found(signs: tuple[int, int], search: dict[str, Any]) -> None:
    first = np.random.default_rng(1).integers(0, MODULUS, 3000, dtype=np.uint32)
    first[70] = first[7]
    wide = first.astype(np.int64)
    total = int(signs[0] * wide[7] + signs[1] * wide[9]) % MODULUS
    found = {(int(i), int(j)) for ones, others in search["pairs"](first, total, signs) for i, j in zip(ones, others, strict=True)}
    sums = (signs[0] * wide[:, None] + signs[1] * wide[None]) % MODULUS
    assert found == {(int(i), int(j)) for i, j in np.argwhere(sums == total)} >= {(7, 9), (70, 9)}
