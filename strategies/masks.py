"""The arithmetic of SecAgg+ as Flower's clients do it: masks made again from shares, and sums read back from whole numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key
from numpy.typing import NDArray

from flpriv.secure_aggregation import MODULUS, Numbers

Masked = NDArray[np.int64]
"""``(1 + P,)``: the weight, then a weighted update of P entries, masked or not, modulo :data:`MODULUS`."""


def own_mask(shares: Sequence[bytes], *, size: int) -> Masked:
    """A node's own mask ``(size,)``, from shares of its seed.

    Raises:
        ValueError: if the shares are too few, or not of one secret.
    """
    return _drawn(combine_shares(list(shares)), size)


def pair_masks(shares: Sequence[bytes], node: int, others: Mapping[int, bytes], *, size: int) -> Masked:
    """What ``node`` adds to its update for ``others``, together ``(size,)``, from shares of its private key.

    Args:
        shares: of the private key.
        node: whose it is.
        others: pseudonym to the public key of each.
        size: entries of a masked vector.

    Raises:
        ValueError: if the shares are too few, or not of one secret.
    """
    private = bytes_to_private_key(combine_shares(list(shares)))
    total = np.zeros(size, dtype=np.int64)
    for other, public in others.items():
        mask = _drawn(generate_shared_key(private, bytes_to_public_key(public)), size)
        total += mask if node > other else -mask
    return total


def weight(examples: int, numbers: Numbers) -> int:
    """What stands in front of the update of a node with so many examples."""
    return round(examples / numbers.max_weight * numbers.steps)


def mean(total: Masked, numbers: Numbers, *, nodes: int) -> NDArray[np.float64]:
    """The weighted mean ``(P,)`` of the updates behind ``total``, which holds no mask any more.

    Args:
        total: the sum over ``nodes`` of their vectors.
        numbers: by which they were made.
        nodes: how many.
    """
    whole, step = total & (MODULUS - 1), 2 * numbers.clipping_range / numbers.steps
    found: NDArray[np.float64] = (whole[1:] * step - nodes * numbers.clipping_range) * (numbers.steps / whole[0])
    return found


def added(vectors: Iterable[Masked]) -> Masked:
    """The sum of vectors, at least one."""
    first, *others = vectors
    total = first.astype(np.int64, copy=True)
    for vector in others:
        total += vector
    return total


def _drawn(seed: bytes, size: int) -> Masked:
    return np.concatenate(pseudo_rand_gen(seed, MODULUS, [(1,), (size - 1,)]))
