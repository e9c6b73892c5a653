"""95 % intervals: exact for counts, bootstrapped over patients for anything else, Student's t over repeats."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Interval = tuple[float, float]
Rows = NDArray[np.intp]


def clopper_pearson(successes: float, n: float, *, level: float = 0.95) -> Interval:
    """Exact binomial interval of ``successes`` out of ``n``, both ends in [0, 1]; (0, 1) for n = 0.

    Counts may be fractions: a rate over n patients with several images each is ``rate * n`` out of ``n``.

    Paper: Clopper and Pearson 1934.
    """
    from scipy.stats import beta

    if n <= 0:
        return 0.0, 1.0
    tail = (1 - level) / 2
    low = float(beta.ppf(tail, successes, n - successes + 1)) if successes > 0 else 0.0
    high = float(beta.ppf(1 - tail, successes + 1, n - successes)) if successes < n else 1.0
    return low, high


def student(values: ArrayLike, *, level: float = 0.95) -> Interval | None:
    """Interval of the mean of independent ``values`` (repeats); ``None`` for fewer than two."""
    from scipy.stats import t

    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return None
    half = float(t.ppf((1 + level) / 2, sample.size - 1)) * float(sample.std(ddof=1)) / sample.size**0.5
    return float(sample.mean()) - half, float(sample.mean()) + half


def bootstrap(
    statistic: Callable[[Rows], float],
    groups: Sequence[str] | int,
    *,
    seed: int,
    resamples: int = 1000,
    level: float = 0.95,
) -> Interval | None:
    """Percentile interval of ``statistic`` over resampled patients.

    Args:
        statistic: of the rows it is given (indices, with repetitions); NaN where a resample cannot tell.
        groups: one patient per row, drawn together; or the number of rows, each its own.
        seed: of the draws.
        resamples: how many.
        level: of the interval.

    Returns:
        The interval, or ``None`` for fewer than two patients or where most resamples cannot tell.
    """
    of = np.arange(groups) if isinstance(groups, int) else np.unique(np.asarray(groups), return_inverse=True)[1]
    count = int(of.max()) + 1 if of.size else 0
    if count < 2:
        return None
    order = np.argsort(of, kind="stable")
    members = np.split(order, np.cumsum(np.bincount(of))[:-1])
    rng = np.random.default_rng(seed)
    alone = count == of.size
    values = []
    for _ in range(resamples):
        drawn = rng.integers(count, size=count)
        values.append(statistic(order[drawn] if alone else np.concatenate([members[i] for i in drawn])))
    told = np.asarray(values)[~np.isnan(values)]
    if told.size < resamples / 2:
        return None
    low, high = np.quantile(told, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def bootstrap_mean(
    values: ArrayLike, groups: Sequence[str] | int | None = None, *, seed: int, level: float = 0.95
) -> Interval | None:
    """Percentile interval of the mean of ``values`` over resampled patients (``groups``; each value its own without)."""
    sample = np.asarray(values, dtype=np.float64)
    return bootstrap(lambda rows: float(sample[rows].mean()), sample.size if groups is None else groups, seed=seed, level=level)
