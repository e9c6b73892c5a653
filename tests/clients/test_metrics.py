"""Class-balanced metrics against scikit-learn."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.metrics import balanced_accuracy_score
from sklearn.utils.class_weight import compute_class_weight

from flpriv.clients.metrics import balanced_accuracy, class_weights


@pytest.mark.parametrize("seed", range(5))
def test_balanced_accuracy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    truth, predicted = rng.choice(4, size=50, p=[0.7, 0.2, 0.1, 0.0]), rng.integers(0, 4, 50)
    found = balanced_accuracy(torch.from_numpy(predicted), torch.from_numpy(truth))
    with pytest.warns(UserWarning, match="y_pred contains classes not in y_true"):
        assert found == pytest.approx(balanced_accuracy_score(truth, predicted), abs=1e-6)


def test_class_weights() -> None:
    labels = np.array([0] * 7 + [1] * 2 + [3])
    found = class_weights(torch.from_numpy(labels), 4)
    expected = compute_class_weight("balanced", classes=np.array([0, 1, 3]), y=labels)
    np.testing.assert_allclose(found[[0, 1, 3]].numpy(), expected, rtol=1e-6)
    assert found[2] == 0
    assert float(found[torch.from_numpy(labels)].mean()) == pytest.approx(1)
