from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.malicious.sparse_rows import Found, Rows, images_in, one_a_row

Make = Callable[..., Any]
PIXELS = 400


def images(count: int, *, seed: int = 0) -> Tensor:
    """``(count, PIXELS)`` float64 in [0, 1], unlike each other."""
    return torch.rand(count, PIXELS, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rows(batch: Tensor, numbers: Sequence[float], fired: Tensor) -> Rows:
    """An update in which image n sends ``numbers[n]`` to neurons k with ``fired[k, n]``, and weights under which it fires them.

    Weights are minimum-norm solutions of w·x + b = 1 for images that fire and -1 for those that don't.
    """
    signs = torch.where(fired, 1.0, -1.0).double()
    bias = torch.full((len(fired),), -0.5, dtype=torch.float64)
    weight = (signs - bias[:, None]) @ torch.linalg.pinv(batch).T
    sent = fired.double() * torch.tensor(numbers, dtype=torch.float64)
    return Rows.of(weight, bias, sent @ batch, sent.sum(1))


def read(of: Rows, *, most: int | None = None) -> Found:
    return images_in(of, most=most, rng=torch.Generator().manual_seed(0))


def errors(found: Found, batch: Tensor) -> Tensor:
    """Root mean square error of each image's nearest reconstruction."""
    nearest: Tensor = torch.cdist(batch, found.images).amin(1).div(PIXELS**0.5)
    return nearest


def pattern(*fired: str) -> Tensor:
    """One word a neuron, the letters of the images that fire it: ``"ac"``."""
    letters = sorted(set("".join(fired)))
    return torch.tensor([[letter in word for letter in letters] for word in fired])


def test_an_image_alone_in_a_row_comes_back() -> None:
    batch = images(2)
    found = read(rows(batch, [1e-3, -2e-3], pattern("a", "b", "b")))
    assert errors(found, batch).max() < 1e-5 and len(found.images) == 2


def test_images_that_are_never_alone_come_back_once_the_others_are_known() -> None:
    """b is alone in no row, and neither is c."""
    batch = images(3)
    found = read(rows(batch, [1e-3, 1e-3, 2e-3], pattern("a", "a", "ab", "ab", "abc", "abc")))
    assert errors(found, batch).max() < 1e-4


def test_images_come_back_from_differences_where_no_row_holds_one_alone() -> None:
    batch = images(4)
    fired = pattern("ab", "abc", "abcd", "abd", "bcd", "acd", "cd", "ac")
    found = read(rows(batch, [1e-3, 1.3e-3, -0.8e-3, 2e-3], fired))
    assert errors(found, batch).max() < 1e-4


@pytest.mark.parametrize("share", [0.05, 0.1])
def test_random_patterns_of_thirty_images_are_undone(share: float) -> None:
    """200 neurons, each fired by one or two of 30 images in ten, with numbers over a factor of 30 and both signs."""
    rng = torch.Generator().manual_seed(1)
    batch = images(30)
    fired = torch.rand(200, 30, generator=rng) < share
    alone = int(fired[fired.sum(1) == 1].any(0).sum())
    numbers = (10 ** (-3 - 1.5 * torch.rand(30, generator=rng)) * torch.randn(30, generator=rng).sign()).tolist()
    found = read(rows(batch, numbers, fired), most=30)
    good = int((errors(found, batch) < 0.01).sum())
    assert good >= 29 > alone or good == 30
    assert len(found.images) <= 30


def test_the_surest_are_those_that_are_right() -> None:
    batch = images(4)
    found = read(rows(batch, [1e-3] * 4, pattern("a", "a", "ab", "b", "cd", "cd", "acd", "d")), most=4)
    wrong = torch.cdist(found.images, batch).amin(1) / PIXELS**0.5
    assert wrong[0] < 1e-4 and found.confidence.tolist() == sorted(found.confidence.tolist(), reverse=True)
    assert ((found.confidence > 0) & (found.confidence <= 1)).all()


def test_rows_within_their_rounding_hold_nothing() -> None:
    weight, bias = torch.randn(6, PIXELS, generator=torch.Generator().manual_seed(0)), torch.ones(6)
    still = Rows.of(weight, bias, torch.zeros(6, PIXELS).double(), torch.zeros(6).double())
    found = read(still)
    assert found.images.shape == (0, PIXELS) and found.confidence.shape == (0,)


def test_no_more_than_were_there() -> None:
    batch = images(5)
    moved = rows(batch, [1e-3] * 5, torch.eye(5, dtype=torch.bool))
    assert len(read(moved).images) == 5
    assert len(read(moved, most=2).images) == 2


def test_equal_draws_equal_images() -> None:
    moved = rows(images(6), [1e-3] * 6, torch.rand(40, 6, generator=torch.Generator().manual_seed(2)) < 0.4)
    one, again = read(moved), read(moved)
    assert torch.equal(one.images, again.images) and torch.equal(one.confidence, again.confidence)


def test_read_singly_a_row_of_one_image_is_that_image_and_others_are_means() -> None:
    batch = images(3)
    moved = torch.stack([2 * batch[0], batch[1] - 0.5 * batch[2], torch.zeros(PIXELS, dtype=torch.float64)])
    found = one_a_row(moved, torch.tensor([2.0, 0.5, 0.0], dtype=torch.float64))
    assert found.images.shape == (2, PIXELS) and found.confidence.tolist() == [1, 1]
    assert torch.allclose(found.images, torch.stack([batch[0], (2 * batch[1] - batch[2]).clamp(0, 1)]))
