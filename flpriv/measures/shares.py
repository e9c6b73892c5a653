"""95 % intervals of shares of images, where the images of one patient do not count as independent."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flpriv.measures.intervals import Interval, clopper_pearson


def share_interval(hits: ArrayLike, groups: Sequence[str], *, level: float = 0.95) -> Interval:
    """Interval of the share of ``hits``: Clopper-Pearson with the number of images the sample is worth.

    That number is ``p (1 - p)`` over the variance of the share between patients, made smaller for few patients by the ratio
    of the t quantiles of n - 1 and patients - 1 degrees. It never exceeds the images, as if all were independent, nor falls
    below ``n² / sum n_g²``, as if a patient's images were copies of one another. A share of 0 or 1 shows no variance between
    patients whatever there is, so it gets the lower of the two. With one image a patient this is Clopper-Pearson itself.

    Args:
        hits: ``(N,)`` bool.
        groups: N names of patients; those of one name are drawn together.
        level: of the interval.

    Returns:
        Both ends in [0, 1], never the same; (0, 1) for no images.

    Paper: Korn and Graubard 1998, "Confidence intervals for proportions with small expected number of positive counts
    estimated from survey data".
    """
    found = np.asarray(hits, dtype=np.float64)
    if not found.size:
        return 0.0, 1.0
    worth = _worth(found, np.unique(np.asarray(groups), return_inverse=True)[1], level)
    return clopper_pearson(float(found.mean()) * worth, worth, level=level)


def _worth(found: NDArray[np.float64], of: NDArray[np.intp], level: float) -> float:
    """How many independent images the sample is worth."""
    from scipy.stats import t

    n, share, sizes = found.size, float(found.mean()), np.bincount(of)
    copies = float(n**2 / np.square(sizes).sum())
    if len(sizes) in (1, n) or share in (0.0, 1.0):
        return copies
    patients = len(sizes)
    excess = np.bincount(of, weights=found - share)
    variance = float(np.square(excess).sum()) * patients / (patients - 1) / n**2
    independent = min(share * (1 - share) / variance, n) if variance > 0 else n
    few = (t.ppf((1 + level) / 2, n - 1) / t.ppf((1 + level) / 2, patients - 1)) ** 2
    return max(copies, float(independent * few))
