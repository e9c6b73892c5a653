from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.inversion.head import Head, take_apart


def sent(
    labels: list[int], *, classes: int = 10, spread: float = 0.05, factor: float = 1.0
) -> tuple[Head | None, Tensor, Tensor]:
    """What is found of a last layer, and the features and slopes behind it."""
    rng = torch.Generator().manual_seed(len(labels))
    weight = spread * torch.randn(classes, 40, generator=rng, dtype=torch.float64)
    bias = spread * torch.randn(classes, generator=rng, dtype=torch.float64)
    features = torch.rand(len(labels), 40, generator=rng, dtype=torch.float64)
    logits = (features @ weight.T + bias).requires_grad_()
    (slopes,) = torch.autograd.grad(factor * cross_entropy(logits, torch.tensor(labels)), logits)
    return take_apart(weight, bias, slopes.T @ features, slopes.sum(0), torch.tensor(labels)), features, slopes


@pytest.mark.parametrize("labels", [[3], [0, 1], [5, 2, 7, 0], [0, 1, 2, 3, 4, 5, 6, 7, 8]], ids=str)
@pytest.mark.parametrize("spread", [0.05, 0.3], ids=["initial", "trained"])
def test_images_of_different_labels_are_told_apart(labels: list[int], spread: float) -> None:
    head, features, slopes = sent(labels, spread=spread)
    assert head is not None and head.error < 1e-8
    assert torch.allclose(head.features, features, atol=1e-5)
    assert torch.allclose(head.slopes, slopes, atol=1e-7)


@pytest.mark.parametrize("labels", [[3, 3], [0, 0, 1, 2], [0, 0, 1, 1, 2, 2, 3, 3]], ids=str)
def test_images_of_one_label_too(labels: list[int]) -> None:
    head, features, _ = sent(labels, spread=0.2)
    assert head is not None and head.error < 1e-5
    near = torch.cdist(head.features, features)
    assert sorted(near.argmin(1).tolist()) == list(range(len(labels))) and float(near.amin(1).max()) < 1e-3


def test_one_image_of_two_classes() -> None:
    head, features, _ = sent([1], classes=2)
    assert head is not None and torch.allclose(head.features, features, atol=1e-5)


@pytest.mark.parametrize("factor", [0.01, 0.3, 20.0])
def test_clipping_does_not_matter(factor: float) -> None:
    head, features, slopes = sent([4, 1, 8], factor=factor)
    assert head is not None and head.error < 1e-8
    assert torch.allclose(head.features, features, atol=1e-5) and torch.allclose(head.slopes, slopes, atol=1e-7 * factor)


def test_no_more_images_than_classes_less_one() -> None:
    assert sent([0, 1], classes=2)[0] is None
    assert sent([0, 1, 2], classes=3)[0] is None


def test_another_rank_or_other_labels_do_not_fit() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, moved = (torch.randn(10, 40, generator=rng, dtype=torch.float64) for _ in range(2))
    pushed = torch.randn(10, generator=rng, dtype=torch.float64)
    head = take_apart(weight, 0 * pushed, moved, pushed, torch.tensor([0, 1, 2]))
    assert head is None or head.error > 0.1
    single = moved[:, :1] @ moved[:1, :]
    assert take_apart(weight, 0 * pushed, single, pushed, torch.tensor([0, 1, 2])) is None
