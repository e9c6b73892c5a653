from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, balanced_accuracy_score, roc_auc_score

from flpriv.measures.utility import utility


@pytest.mark.parametrize("classes", [2, 4])
def test_numbers_are_sklearns(classes: int) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, classes, (300,), generator=rng)
    logits = torch.randn(300, classes, generator=rng) + 1.5 * torch.nn.functional.one_hot(labels, classes)
    accuracy, balanced, auroc = utility(logits, labels, seed=0)
    guesses, probabilities = logits.argmax(1).numpy(), logits.double().softmax(1).numpy()
    assert accuracy.value == pytest.approx(accuracy_score(labels, guesses))
    assert balanced.value == pytest.approx(balanced_accuracy_score(labels, guesses))
    expected = roc_auc_score(labels, probabilities[:, 1] if classes == 2 else probabilities, multi_class="ovr")
    assert auroc.value == pytest.approx(expected)
    assert [m.name for m in (accuracy, balanced, auroc)] == ["accuracy", "balanced accuracy", "AUROC"]
    assert accuracy.null == pytest.approx(np.bincount(labels).max() / 300)
    assert (balanced.null, auroc.null) == (1 / classes, 0.5)
    for metric in (accuracy, balanced, auroc):
        assert metric.low is not None
        assert metric.high is not None
        assert metric.value is not None
        assert metric.low < metric.value < metric.high
        assert metric.n == 300


def test_intervals_are_over_patients() -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(0, 2, (40,), generator=rng).repeat_interleave(6)
    logits = (torch.randn(40, 2, generator=rng)).repeat_interleave(6, 0)
    alone = utility(logits, labels, seed=0)[0]
    together = utility(logits, labels, [str(i // 6) for i in range(240)], seed=0)[0]
    assert alone.low is not None
    assert together.low is not None
    assert together.value == alone.value
    assert together.low < alone.low


def test_a_single_class_has_no_auroc() -> None:
    accuracy, balanced, auroc = utility(torch.tensor([[1.0, 0.0]] * 5), torch.zeros(5, dtype=torch.long), seed=0)
    assert accuracy.value == balanced.value == 1
    assert auroc.value is None
    assert auroc.note == "only one class occurs"
