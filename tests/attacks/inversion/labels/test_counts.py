from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flpriv.attacks.inversion.labels.counts import balanced, count, shares, whole
from flpriv.clients.metrics import class_weights

some_counts = st.lists(st.integers(0, 9), min_size=2, max_size=8).filter(any)


def test_counts_are_whole_and_add_up() -> None:
    marks = torch.eye(3) * -1 + 0.3
    assert count(marks.mean(0), marks, images=7).sum() == 7
    assert count(0.5 * marks[0] + 0.5 * marks[2], marks, images=4).tolist() == [2, 0, 2]


@given(counts=some_counts, seed=st.integers(0, 99))
def test_a_mixture_of_marks_is_taken_apart(counts: list[int], seed: int) -> None:
    """Each class with its own answers, none of them as sure as the label."""
    rng = torch.Generator().manual_seed(seed)
    classes, images = len(counts), sum(counts)
    answers = (0.5 * torch.randn(classes, classes, generator=rng, dtype=torch.float64)).softmax(1)
    marks = 0.8 * answers - torch.eye(classes)
    mark = torch.tensor(counts, dtype=torch.float64) @ marks / images
    assert shares(mark, marks).sum().item() == pytest.approx(1)
    assert count(mark, marks, images=images).tolist() == counts


@given(mark=st.lists(st.floats(-2, 2), min_size=4, max_size=4), images=st.integers(1, 40))
def test_any_mark_gives_counts(mark: list[float], images: int) -> None:
    counts = count(torch.tensor(mark), 0.25 - torch.eye(4), images=images)
    assert counts.sum() == images
    assert (counts >= 0).all()


def test_an_update_of_nothing_is_as_even_as_the_answers() -> None:
    assert count(torch.zeros(4), 0.25 - torch.eye(4), images=8).tolist() == [2, 2, 2, 2]


@given(counts=some_counts)
def test_whole_shares_stay(counts: list[int]) -> None:
    assert whole(torch.tensor(counts) / sum(counts), images=sum(counts)).tolist() == counts


def test_remainders_go_to_the_largest() -> None:
    assert whole(torch.tensor([0.5, 0.3, 0.2]), images=4).tolist() == [2, 1, 1]


@given(counts=some_counts)
def test_a_balanced_loss_over_all_records_shows_which_classes_occur_and_no_more(counts: list[int]) -> None:
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    weighted = torch.tensor(counts) * class_weights(labels, len(counts)).nan_to_num(0)
    share = weighted / weighted.sum()
    present = torch.tensor(counts) > 0
    assert torch.allclose(share[present], torch.full_like(share[present], 1 / int(present.sum())))
    told = balanced(share, torch.ones(len(counts)), images=len(labels), all_records=True)
    assert torch.equal(told > 0, present)
    assert told.sum() == len(labels)
    assert torch.equal(balanced(share, torch.tensor(counts) + 1e-3, images=len(labels), all_records=True), torch.tensor(counts))


def test_a_balanced_batch_is_counted_where_the_sites_frequencies_are_known() -> None:
    """90 and 30 records weigh 2/3 and 2; a batch of 4 and 2 shows 8/3 and 4."""
    share = torch.tensor([4 * 2 / 3, 2 * 2.0])
    assert balanced(share / share.sum(), torch.tensor([90.0, 30.0]), images=6, all_records=False).tolist() == [4, 2]


def test_rare_classes_found_keep_one_image() -> None:
    prior = torch.tensor([98.0, 1.0, 1.0])
    assert balanced(torch.full((3,), 1 / 3), prior, images=5, all_records=True).tolist() == [3, 1, 1]
