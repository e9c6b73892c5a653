from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.labels import marks_of, recover
from flpriv.attacks.inversion.labels.counts import count
from flpriv.attacks.inversion.unroll import replay
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records


def recovered(done: Any, *, guesses: Records | None = None) -> torch.Tensor:
    (seen,) = done.capture.observations
    site = replay(done.capture.task, seen.sent, recipe=seen.local, examples=seen.examples, device=torch.device("cpu"))
    noise = torch.rand((16, *done.capture.task.shape), generator=torch.Generator().manual_seed(9))
    return recover(
        site,
        [seen.update[name] / -seen.local.lr for name in site.start],
        classes=len(done.capture.task.classes),
        guesses=noise if guesses is None else guesses.images,
        guessed=torch.full((16,), -1) if guesses is None else guesses.labels,
    )


@pytest.mark.parametrize("label", range(4))
def test_the_label_of_one_image(federate: Callable[..., Any], smooth: Callable[..., Any], label: int) -> None:
    records = Records(images=smooth(1).images, labels=torch.tensor([label]))
    recipe = LocalRecipe(lr=0.1, batch_size=1, steps=1, weight_decay=0.5, train_mode=False)
    assert recovered(federate(records, recipe=recipe, classes=4)).tolist() == [label]


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.05, batch_size=8, steps=1, train_mode=False),
        LocalRecipe(lr=0.002, batch_size=2, steps=4, weight_decay=0.01, train_mode=False),
    ],
    ids=["one step", "four steps"],
)
@pytest.mark.parametrize("labels", [[0] * 8, [0, 0, 0, 0, 0, 1, 1, 3], [0, 1, 1, 2, 2, 3, 3, 3]])
def test_labels_of_a_batch_counted_at_an_untrained_model(
    federate: Callable[..., Any], smooth: Callable[..., Any], labels: list[int], recipe: LocalRecipe
) -> None:
    records = Records(images=smooth(8).images, labels=torch.tensor(labels))
    assert recovered(federate(records, recipe=recipe, classes=4)).tolist() == labels


def test_public_images_are_asked_with_their_own_labels(federate: Callable[..., Any], smooth: Callable[..., Any]) -> None:
    records = Records(images=smooth(6).images, labels=torch.tensor([0, 0, 0, 0, 1, 1]))
    done = federate(records, recipe=LocalRecipe(lr=0.05, batch_size=6, steps=1, train_mode=False))
    assert recovered(done, guesses=smooth(12, seed=5)).tolist() == [0, 0, 0, 0, 1, 1]


def test_counts_are_whole_and_add_up() -> None:
    marks = torch.eye(3) * -1 + 0.3
    assert count(marks.mean(0), marks, images=7).sum() == 7
    assert count(0.5 * marks[0] + 0.5 * marks[2], marks, images=4).tolist() == [2, 0, 2]


def test_marks_are_the_last_bias_or_the_row_sums_of_the_last_weight() -> None:
    update = {"a.weight": torch.ones(2, 3), "b.weight": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "c": torch.ones(5)}
    assert marks_of(update, classes=2).tolist() == [3, 7]
    assert marks_of({**update, "b.bias": torch.tensor([5.0, 6.0])}, classes=2).tolist() == [5, 6]
    with pytest.raises(FlprivError, match="know-labels"):
        marks_of(update, classes=4)
