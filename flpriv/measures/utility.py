"""Utility: how well the trained model does its job, with intervals over patients."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flpriv.finding import Metric
from flpriv.measures.intervals import Rows, bootstrap
from flpriv.measures.membership import auc


def utility(logits: Tensor, labels: Tensor, patients: Sequence[str] = (), *, seed: int = 0) -> tuple[Metric, ...]:
    """Accuracy, balanced accuracy and AUROC with 95 % intervals bootstrapped over patients.

    Args:
        logits: ``(N, classes)``.
        labels: ``(N,)`` class indices.
        patients: one id per record; each record its own without.
        seed: of the bootstrap.

    Returns:
        ``"accuracy"`` (null: the majority class), ``"balanced accuracy"`` (mean recall of the classes that occur; null: chance)
        and ``"AUROC"`` (mean over classes of one against the rest, ``None`` with a single class; null: .5), all in [0, 1].
    """
    scores = logits.detach().to("cpu").double().softmax(1).numpy()
    true = labels.detach().cpu().numpy()
    right = scores.argmax(1) == true
    occur = np.unique(true)

    def balanced(rows: Rows) -> float:
        return float(np.mean([right[rows][true[rows] == c].mean() for c in occur if (true[rows] == c).any()]))

    def auroc(rows: Rows) -> float:
        return _auroc(scores[rows], true[rows])

    shares = np.bincount(true) / max(len(true), 1)
    groups = list(patients) or len(true)

    def metric(name: str, of: object, null: float, null_name: str, resamples: int) -> Metric:
        assert callable(of)
        value = float(of(np.arange(len(true))))
        if np.isnan(value):
            return Metric(name=name, value=None, n=len(true), null=null, null_name=null_name, note="only one class occurs")
        low, high = bootstrap(of, groups, seed=seed, resamples=resamples) or (None, None)
        return Metric(name=name, value=value, low=low, high=high, n=len(true), null=null, null_name=null_name)

    return (
        metric("accuracy", lambda rows: right[rows].mean(), float(shares.max()), "majority class", 1000),
        metric("balanced accuracy", balanced, 1 / len(occur), "chance", 1000),
        metric("AUROC", auroc, 0.5, "chance", 500),
    )


def _auroc(scores: NDArray[np.float64], true: NDArray[np.int64]) -> float:
    """Mean over the classes that occur of one against the rest; NaN where only one does."""
    occur = np.unique(true)
    return float(np.mean([auc(scores[:, c], true == c) for c in occur])) if len(occur) > 1 else float("nan")
