"""Lower bounds on epsilon from the scores of canaries that were in or out by a fair coin, and what a claimed epsilon allows.

A canary that is scored high is guessed in, one that is scored low out, and on those between the test may abstain. If the
mechanism is (ε, δ)-differentially private, no guess is right with a chance above ``q = e^ε / (1 + e^ε)`` but for δ, whatever the
other coins show.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from flpriv.measures.intervals import Interval, clopper_pearson

Floats = NDArray[np.float64]

STEP = 0.02
"""Bounds of :func:`one_run` are multiples of this."""
LEAST = 0.06
"""A bound below this says 0: it would be no finding, and noise alone would pass for one more often."""
MOST = 15.0
"""No more than this is ever said."""
FEWEST = 8
"""The fewest guesses that are tried."""


def chance(epsilon: float) -> float:
    """The largest chance of a right guess about one fair coin under pure ε-differential privacy, in [.5, 1)."""
    return 1 / (1 + math.exp(-epsilon))


def p_value(canaries: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """The chance, at most, of ``right`` or more right guesses under (ε, δ)-differential privacy, for guesses counted beforehand.

    ``β + 2 m δ α`` with ``β = P[Bin(r, q) ≥ v]`` and ``α = max_i P[v - i ≤ Bin(r, q) < v] / i`` over i = 1 … v.

    Paper: Steinke, Nasr and Jagielski 2023, theorem 5.2 (arXiv 2305.08846).

    Args:
        canaries: m, all of them.
        guesses: r ≤ m, those not abstained on.
        right: v ≤ r.
        epsilon: ε ≥ 0.
        delta: δ in [0, 1).
    """
    from scipy.stats import binom

    q = chance(epsilon)
    tail = float(binom.sf(right - 1, guesses, q))
    below = np.cumsum(binom.pmf(np.arange(right - 1, -1, -1), guesses, q))
    alpha = float((below / np.arange(1, right + 1)).max()) if right else 0.0
    return min(1.0, tail + 2 * canaries * delta * alpha)


def fixed(canaries: int, guesses: int, right: int, *, delta: float, confidence: float = 0.95) -> float:
    """The largest ε that ``right`` of ``guesses`` right guesses refute, 0 if none; ``guesses`` must be chosen beforehand."""
    from scipy.optimize import brentq

    def excess(epsilon: float) -> float:
        return p_value(canaries, guesses, right, epsilon, delta) - (1 - confidence)

    if excess(0.0) >= 0:
        return 0.0
    return MOST if excess(MOST) < 0 else float(brentq(excess, 0.0, MOST, xtol=1e-9))


def counts(canaries: int) -> tuple[int, ...]:
    """The numbers of guesses that :func:`one_run` looks at, ascending: m and its halvings in steps of √2."""
    found = {round(canaries / 2 ** (k / 2)) for k in range(2 * max(1, canaries).bit_length())}
    return tuple(sorted(r for r in found if r >= min(FEWEST, canaries)))


def guessed(scores: ArrayLike) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    """Canaries from the surest guess to the least sure one, and the guesses: the highest score in, the lowest out, and so on."""
    ranked = np.argsort(-np.asarray(scores, dtype=np.float64), kind="stable")
    order = np.empty_like(ranked)
    order[::2], order[1::2] = ranked[: (len(ranked) + 1) // 2], ranked[::-1][: len(ranked) // 2]
    return order, np.arange(len(ranked)) % 2 == 0


def one_run(scores: ArrayLike, included: ArrayLike, *, delta: float, confidence: float = 0.95) -> float:
    """A lower bound on ε from one training run, 0 where nothing is shown; the number of guesses is chosen by the outcome.

    Guesses stand in the order of their confidence. Whatever coins came before, the next guess is right with a chance of at most
    ``q + f``, where f is δ's share: it adds at most δ for each canary over all outcomes. So the running number of right guesses
    stays below that of m independent coins of chance q, but with a chance of mδ. What is tested is how unlikely the most unlikely
    of the counts at r guesses is, over all r in :func:`counts`; the chance that coins of q do as well somewhere along the way is
    computed exactly. That is the correction for the choice of r, and it is smaller than one that takes the counts at different r
    as unrelated. All multiples of ``STEP`` up to the bound are refuted, each at the whole ``confidence``.

    Paper: after Steinke, Nasr and Jagielski 2023 (arXiv 2305.08846).

    Args:
        scores: ``(m,)``, larger means in.
        included: ``(m,)`` bool, by fair coins independent of everything else.
        delta: δ in [0, 1); above ``(1 - confidence) / m`` nothing can be shown.
        confidence: in (0, 1).
    """
    order, guess = guessed(scores)
    right = np.cumsum(np.asarray(included, dtype=bool)[order] == guess)
    grid = counts(len(order))
    return _largest(len(order), grid, [int(right[r - 1]) for r in grid], delta=delta, confidence=confidence)


@lru_cache(maxsize=64)
def ceiling(canaries: int, *, delta: float, confidence: float = 0.95) -> float:
    """The bound that :func:`one_run` gives where all guesses are right: no leakage however large shows more."""
    grid = counts(canaries)
    return _largest(canaries, grid, list(grid), delta=delta, confidence=confidence)


def _largest(canaries: int, grid: tuple[int, ...], right: list[int], *, delta: float, confidence: float) -> float:
    allowed = 1 - confidence - canaries * delta
    found, step = 0.0, round(LEAST / STEP)
    while step * STEP <= MOST and crossing(grid, right, chance(step * STEP)) < allowed:
        found, step = round(step * STEP, 9), step + 1
    return found


def crossing(grid: tuple[int, ...], right: list[int], q: float) -> float:
    """The chance that a walk of right guesses, each right with chance q, is anywhere on the grid as unlikely as ``right`` is."""
    smallest = min(_tail(v, r, q) for r, v in zip(grid, right, strict=True)) * (1 + 1e-9)
    walk, crossed, before = np.ones(1), 0.0, 0
    for r in grid:
        walk = np.convolve(walk, _binomial(r - before, q))
        bound = bisect_left(range(r + 1), -smallest, key=partial(_minus_tail, guesses=r, q=q))
        crossed += float(walk[bound:].sum())
        walk[bound:] = 0
        before = r
    return crossed


def _tail(right: int, guesses: int, q: float) -> float:
    """``P[Bin(guesses, q) ≥ right]``."""
    from scipy.special import bdtrc

    return float(bdtrc(right - 1, guesses, q)) if right > 0 else 1.0


def _minus_tail(right: int, guesses: int, q: float) -> float:
    return -_tail(right, guesses, q)


def _binomial(n: int, q: float) -> Floats:
    """``P[Bin(n, q) = k]`` for k = 0 … n."""
    from scipy.special import gammaln, xlogy

    k = np.arange(n + 1)
    return np.asarray(np.exp(gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1) + xlogy(k, q) + xlogy(n - k, 1 - q)))


@dataclass(frozen=True, kw_only=True)
class Rates:
    """One-sided Clopper-Pearson bounds of a threshold's error rates, which hold together.

    Args:
        fpr: upper bound of the false positive rate.
        fnr: upper bound of the false negative rate.
    """

    fpr: float
    fnr: float

    @property
    def epsilon(self) -> float:
        """What the rates refute at δ = 0, before the logarithm: ``max{(1 - fnr) / fpr, (1 - fpr) / fnr}``."""
        return max((1 - self.fnr) / self.fpr, (1 - self.fpr) / self.fnr)

    @property
    def mu(self) -> float:
        """μ of the Gaussian mechanism that just has these rates, ``Φ⁻¹(1 - fpr) - Φ⁻¹(fnr)``; below 0 for worse than guessing."""
        from scipy.special import ndtri

        return float(ndtri(1 - self.fpr) - ndtri(self.fnr))


def rates(scores: ArrayLike, included: ArrayLike, *, by: Literal["epsilon", "mu"], confidence: float = 0.95) -> Rates:
    """Error rates of a threshold on every second canary, where the others have chosen it.

    Args:
        scores: ``(m,)``, larger means in.
        included: ``(m,)`` bool.
        by: of what the chosen threshold is to have most.
        confidence: of both rates together; each is bounded at ``1 - (1 - confidence) / 2``.
    """
    score, member = np.asarray(scores, dtype=np.float64), np.asarray(included, dtype=bool)
    chosen, best = np.inf, -np.inf
    for threshold in np.unique(score[::2]):
        found = getattr(_rates(score[::2] >= threshold, member[::2], confidence=confidence), by)
        if found > best:
            chosen, best = threshold, found
    return _rates(score[1::2] >= chosen, member[1::2], confidence=confidence)


def _rates(said: NDArray[np.bool_], member: NDArray[np.bool_], *, confidence: float) -> Rates:
    def upper(errors: NDArray[np.bool_]) -> float:
        return _clopper_pearson(int(errors.sum()), errors.size, level=confidence)[1]

    return Rates(fpr=upper(said[~member]), fnr=upper(~said[member]))


@lru_cache(maxsize=1 << 14)
def _clopper_pearson(successes: int, n: int, *, level: float) -> Interval:
    return clopper_pearson(successes, n, level=level)


def clopper_pearson_bound(found: Rates, *, delta: float) -> float:
    """``max{ln((TPR - δ) / FPR), ln((TNR - δ) / FNR)}`` at the bounds of the rates, at least 0.

    It takes the canaries as independent trials, as they are over many runs; in one run they share the noise, and the bound is
    what many runs would show if they did not.

    Paper: Nasr et al. 2021 (arXiv 2101.04535).
    """
    sides = ((1 - found.fnr - delta) / found.fpr, (1 - found.fpr - delta) / found.fnr)
    return math.log(max(1.0, *sides))


def gdp_bound(found: Rates, *, delta: float) -> float:
    """The ε at ``delta`` of the Gaussian mechanism that just has error rates at their bounds, 0 where they are those of guessing.

    It also takes the mechanism's trade-off between both errors for that of a Gaussian one.

    Paper: Nasr et al. 2023 (arXiv 2302.07956).
    """
    return epsilon_of(found.mu, delta=delta)


def delta_of(mu: float, epsilon: float) -> float:
    """δ at ``epsilon`` of a μ-Gaussian-DP mechanism: ``Φ(-ε/μ + μ/2) - e^ε Φ(-ε/μ - μ/2)``; 0 for μ ≤ 0.

    Paper: Dong, Roth and Su 2019 (arXiv 1905.02383).
    """
    from scipy.special import log_ndtr, ndtr

    if mu <= 0:
        return 0.0
    return float(ndtr(-epsilon / mu + mu / 2) - math.exp(epsilon + float(log_ndtr(-epsilon / mu - mu / 2))))


def epsilon_of(mu: float, *, delta: float) -> float:
    """ε at ``delta`` of a μ-Gaussian-DP mechanism, at least 0."""
    from scipy.optimize import brentq

    if delta_of(mu, 0.0) <= delta:
        return 0.0
    most = mu * mu / 2 + mu * 40
    return float(brentq(lambda epsilon: delta_of(mu, epsilon) - delta, 0.0, most, xtol=1e-10))


def mu_of(epsilon: float, *, delta: float) -> float:
    """μ of the Gaussian mechanism that is just (ε, δ)-differentially private.

    Args:
        epsilon: ε ≥ 0.
        delta: δ in (0, 1).
    """
    from scipy.optimize import brentq

    return float(brentq(lambda mu: delta_of(mu, epsilon) - delta, 0.0, math.sqrt(2 * epsilon) + 80.0, xtol=1e-12))


@dataclass(frozen=True, kw_only=True)
class Cap:
    """The most that any attack on one record reaches against a Gaussian mechanism of a claimed (ε, δ).

    Args:
        mu: of the mechanism.
    """

    mu: float

    @classmethod
    def of(cls, epsilon: float, *, delta: float) -> Cap:
        """The cap of a claim; ``epsilon`` ≥ 0 and ``delta`` in (0, 1)."""
        return cls(mu=mu_of(epsilon, delta=delta))

    @property
    def auc(self) -> float:
        """Area under the ROC curve, ``Φ(μ / √2)``."""
        from scipy.special import ndtr

        return float(ndtr(self.mu / math.sqrt(2)))

    def tpr(self, fpr: float) -> float:
        """True positive rate at a false positive rate in (0, 1), ``Φ(μ - Φ⁻¹(1 - fpr))``."""
        from scipy.special import ndtr, ndtri

        return float(ndtr(self.mu + ndtri(fpr)))
