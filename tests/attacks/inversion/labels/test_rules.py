from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from flpriv.attacks.inversion.labels.rules import bias_corrected, idlg, llg, llg_star, minima, negative

Rule = Callable[..., Tensor]
RULES: list[Rule] = [negative, bias_corrected, llg]

marks = st.lists(st.integers(-99, 99), min_size=2, max_size=8, unique=True).map(lambda whole: torch.tensor(whole) / 7.0)


def gradient(counts: list[int], answers: list[float]) -> Tensor:
    """``mean(p - onehot(y))`` where all images get the same answers."""
    return torch.tensor(answers) - torch.tensor(counts) / sum(counts)


def test_one_image_has_the_only_negative_mark() -> None:
    assert idlg(gradient([0, 0, 1], [0.2, 0.5, 0.3])) == 2


def test_negative_marks_are_classes_found_and_the_first_takes_the_rest() -> None:
    mark = gradient([3, 0, 1, 0], [0.25, 0.25, 0.15, 0.35])
    assert negative(mark, images=4).tolist() == [3, 0, 1, 0]
    assert negative(mark, images=1).tolist() == [1, 0, 0, 0]
    assert negative(torch.tensor([0.2, 0.1]), images=2).tolist() == [0, 2]


def test_minima_are_found_where_sums_would_miss_them() -> None:
    """Class 0 holds one image that shines in the first feature alone; its row sums to a positive number."""
    rows = torch.tensor([[-1.0, 2.0, 2.0], [0.1, 0.2, 0.3], [0.5, -0.5, 0.5]])
    assert minima(rows, images=2).tolist() == [1, 0, 1]
    assert minima(rows, images=5).tolist() == [2, 1, 2]


def test_bias_corrected_by_hand() -> None:
    """Negative marks -.5 and -.1 over 4 images: each image takes -.15, after one of each class -.35, +.05 and .3, .3 are left."""
    assert bias_corrected(torch.tensor([-0.5, -0.1, 0.3, 0.3]), images=4).tolist() == [3, 1, 0, 0]


def test_llg_weighs_an_image_more() -> None:
    """Five images share -.5. At -.1 each, class 0 is down to -.06 after three and asks for a fourth, at -.133 it does not."""
    mark = torch.tensor([-0.36, -0.14, 0.5])
    assert bias_corrected(mark, images=5).tolist() == [4, 1, 0]
    assert llg(mark, images=5).tolist() == [3, 2, 0]


@pytest.mark.parametrize("counts", [[1, 2, 0, 1], [5, 3, 0, 2], [0, 0, 7, 0]])
def test_llg_star_counts_where_its_own_images_answer_like_the_sites(counts: list[int]) -> None:
    """LLG alone stops short: what classes with negative marks have in common is not theirs."""
    even = [0.25] * 4
    assert llg_star(gradient(counts, even), torch.tensor(even) - torch.eye(4), images=sum(counts)).tolist() == counts


@pytest.mark.parametrize("rule", RULES)
@given(mark=marks, images=st.integers(1, 20))
def test_rules_give_whole_counts_that_add_up(rule: Rule, mark: Tensor, images: int) -> None:
    counts = rule(mark, images=images)
    assert counts.dtype == torch.int64
    assert counts.sum() == images
    assert (counts >= 0).all()


@pytest.mark.parametrize("rule", RULES)
@given(mark=marks, images=st.integers(1, 9), data=st.data())
def test_rules_do_not_care_how_classes_are_ordered(rule: Rule, mark: Tensor, images: int, data: st.DataObject) -> None:
    """Marks are made uneven, since which of two equal marks comes first is nobody's business."""
    mark = mark + torch.arange(len(mark)).double().mul(0.7301).sin() * 1e-3
    order = torch.tensor(data.draw(st.permutations(range(len(mark)))))
    assert torch.equal(rule(mark[order], images=images), rule(mark, images=images)[order])


@given(images=st.integers(1, 8), classes=st.integers(2, 8), data=st.data())
def test_minima_do_not_care_how_classes_are_ordered(images: int, classes: int, data: st.DataObject) -> None:
    rows = torch.randn(classes, 5, generator=torch.Generator().manual_seed(images))
    order = torch.tensor(data.draw(st.permutations(range(classes))))
    assert torch.equal(minima(rows[order], images=images), minima(rows, images=images)[order])


@given(scale=st.floats(1e-3, 1e3), mark=marks, images=st.integers(1, 9))
def test_rules_on_the_gradient_alone_need_no_scale(scale: float, mark: Tensor, images: int) -> None:
    mark = mark.double() + torch.arange(len(mark)).double().mul(0.7301).sin() * 1e-3
    for rule in RULES:
        assert torch.equal(rule(scale * mark, images=images), rule(mark, images=images))
