"""Searches for trials whose update is the one observed: many at once, each judged by its own objective alone."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from flpriv.progress import tell
from flpriv.scratch import Notebook

Evaluate = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""(trials ``(A, …)``, the problem each belongs to ``(A,)``) to values ``(A,)``, lower is better, and slopes ``(A, …)``."""
Schedule = Literal["step", "cosine", "constant"]


@dataclass(frozen=True, kw_only=True)
class Found:
    """Where searches ended.

    Args:
        trials: ``(P, …)``, the best met on the way.
        objective: ``(P,)`` their values.
        evaluations: ``(P,)`` how often each problem was evaluated.
    """

    trials: Tensor
    objective: Tensor
    evaluations: Tensor


@dataclass(kw_only=True)
class _Log:
    """The best trial of every problem, when to stop, and what an interrupted search left behind."""

    start: Tensor
    iterations: int
    patience: int
    what: str
    key: Mapping[str, Any]
    best: Tensor = field(init=False)
    value: Tensor = field(init=False)
    count: Tensor = field(init=False)

    def __post_init__(self) -> None:
        problems = len(self.start)
        self.best = self.start.clone()
        self.value = torch.full((problems,), torch.inf, device=self.start.device)
        self.count = torch.zeros(problems, dtype=torch.long, device=self.start.device)
        self._mark = self.value.clone()
        self._since = self.count.clone()
        self._notebook = Notebook({**self.key, "what": self.what, "shape": tuple(self.start.shape)})
        self._written = time.monotonic()

    def resume(self, state: dict[str, Tensor]) -> int:
        """Fill ``state`` and this log from the interrupted search, if there was one; the iteration to go on with."""
        kept = self._notebook.read() if self._notebook.open else None
        if kept is None:
            return 0
        for name, own in (("best", self.best), ("value", self.value), ("count", self.count), *state.items()):
            own.copy_(kept[name])
        return int(kept["iteration"])

    def see(self, rows: Tensor, trials: Tensor, values: Tensor) -> None:
        """Take note of evaluated trials."""
        wins = values < self.value[rows]
        self.best[rows] = torch.where(wins.view(-1, *[1] * (trials.dim() - 1)), trials, self.best[rows])
        self.value[rows] = torch.where(wins, values, self.value[rows])
        self.count[rows] += 1

    def done(self) -> Tensor:
        """``(P,)`` bool: no improvement by a thousandth over the last ``patience`` evaluations."""
        better = self.value < self._mark * (1 - 1e-3)
        self._mark = torch.where(better, self.value, self._mark)
        self._since = torch.where(better, self.count, self._since)
        return self.count - self._since >= self.patience

    def tell(self, iteration: int, state: Mapping[str, Tensor]) -> None:
        """Say how far the search is, and leave what it takes to go on now and then."""
        if iteration % 20 == 0:
            shown = self.value[self.value.isfinite()]
            tell(self.what, iteration, self.iterations, f"objective {float(shown.mean()) if len(shown) else math.nan:.3g}")
            if self._notebook.open and time.monotonic() - self._written > 20:
                own = {"best": self.best, "value": self.value, "count": self.count, "iteration": torch.tensor(iteration)}
                self._notebook.write({**own, **state})
                self._written = time.monotonic()

    def end(self) -> Found:
        self._notebook.clear()
        return Found(trials=self.best, objective=self.value, evaluations=self.count)


@dataclass(frozen=True, kw_only=True)
class Adam:
    """Adam, each trial moving by its own moments (Kingma and Ba 2015, https://arxiv.org/abs/1412.6980).

    Args:
        lr: first step, in units of the trials (images are in [0, 1]).
        signed: what Adam is fed: the ``"hard"`` sign of the slope (Geiping et al. 2020), a ``"soft"`` one,
            ``tanh(s·slope) / s`` with s falling from 1 to 0, or the slope itself (``"none"``).
        schedule: ``"step"`` (a tenth after 3/8, 5/8 and 7/8), ``"cosine"`` (to ``floor``) or ``"constant"``.
        floor: share of the first step that a cosine ends at, in [0, 1].
        warmup: evaluations over which the step grows from nothing.
        langevin: Gaussian noise added to the slope, in units of the step; 0 for none.
        box: keep trials in [0, 1].
        patience: a problem ends when it has not improved by a thousandth in so many evaluations.
    """

    lr: float = 0.1
    signed: Literal["hard", "soft", "none"] = "hard"
    schedule: Schedule = "step"
    floor: float = 0.0
    warmup: int = 0
    langevin: float = 0.0
    box: bool = True
    patience: int = 200

    def minimise(
        self,
        evaluate: Evaluate,
        start: Tensor,
        *,
        iterations: int,
        rng: torch.Generator,
        what: str,
        key: Mapping[str, Any] | None = None,
        each: Callable[[Tensor], None] | None = None,
    ) -> Found:
        """Search from ``start`` ``(P, …)`` for at most ``iterations`` evaluations of each problem.

        Args:
            evaluate: the problems.
            start: first trials.
            iterations: ≥ 1.
            rng: for the noise, on the CPU.
            what: for progress.
            key: names the search in scratch space, plain data.
            each: called with all trials before each evaluation.
        """
        trials, first, second = start.detach().clone(), torch.zeros_like(start), torch.zeros_like(start)
        log = _Log(start=trials, iterations=iterations, patience=self.patience, what=what, key=key or {})
        state = {"trials": trials, "first": first, "second": second}
        active = torch.arange(len(start), device=start.device)
        for iteration in range(log.resume(state), iterations):
            if each is not None:
                each(trials)
            values, slopes = evaluate(trials[active], active)
            log.see(active, trials[active], values)
            step = self._step(iteration, iterations)
            if self.langevin:
                slopes = slopes + self.langevin * step * torch.randn(slopes.shape, generator=rng).to(slopes)
            slopes = self._sign(slopes, 1 - iteration / iterations)
            first[active] = mean = 0.9 * first[active] + 0.1 * slopes
            second[active] = square = 0.999 * second[active] + 0.001 * slopes.square()
            mean, square = mean / (1 - 0.9 ** (iteration + 1)), square / (1 - 0.999 ** (iteration + 1))
            moved = trials[active] - step * mean / (square.sqrt() + 1e-8)
            trials[active] = moved.clamp(0, 1) if self.box else moved
            log.tell(iteration + 1, state)
            if iteration % 10 == 9:
                active = active[~log.done()[active]]
                if not len(active):
                    break
        if len(active):
            values, _ = evaluate(trials[active], active)
            log.see(active, trials[active], values)
        return log.end()

    def _step(self, iteration: int, iterations: int) -> float:
        done = iteration / iterations
        warm = min(1.0, (iteration + 1) / (self.warmup + 1))
        if self.schedule == "step":
            return float(self.lr * warm * 0.1 ** sum(done >= eighths / 8 for eighths in (3, 5, 7)))
        share = 0.5 + 0.5 * math.cos(math.pi * done) if self.schedule == "cosine" else 1.0
        return self.lr * warm * (self.floor + (1 - self.floor) * share)

    def _sign(self, slopes: Tensor, scale: float) -> Tensor:
        if self.signed == "none":
            return slopes
        return slopes.sign() if self.signed == "hard" else (scale * slopes).tanh() / scale


@dataclass(frozen=True, kw_only=True)
class LBFGS:
    """L-BFGS with projection on the box and a backtracking line search (Nocedal and Wright, Numerical Optimization, ch. 7).

    Where the model's activations are smooth or its first layers keep what they see, tens of evaluations do what Adam needs a
    thousand for; deep networks with ReLUs stop its line search early.

    Args:
        history: how many pairs of steps and changes of slope are kept, ≥ 1.
        first: longest change of an entry in the first step.
        box: keep trials in [0, 1].
        patience: a problem ends when it has not improved by a thousandth in so many evaluations.
        enough: a problem ends when its value is below this.
    """

    history: int = 20
    first: float = 0.1
    box: bool = True
    patience: int = 40
    enough: float = 0.0

    def minimise(
        self,
        evaluate: Evaluate,
        start: Tensor,
        *,
        iterations: int,
        rng: torch.Generator,
        what: str,
        key: Mapping[str, Any] | None = None,
        each: Callable[[Tensor], None] | None = None,
    ) -> Found:
        """As :meth:`Adam.minimise`; every trial step of the line search counts as an evaluation, and nothing is drawn."""
        here = self._inside(start.detach().clone())
        log = _Log(start=here, iterations=iterations, patience=self.patience, what=what, key=key or {})
        begin = log.resume({})
        here = log.best.clone() if begin else here
        active = torch.arange(len(start), device=start.device)
        value, slope = torch.full_like(log.value, torch.inf), torch.zeros_like(here)
        along, stride = torch.zeros_like(here), torch.ones_like(log.value)
        pairs = _Pairs(here, self.history)
        stuck = torch.zeros(len(start), dtype=torch.long, device=start.device)
        for iteration in range(begin, iterations):
            if each is not None:
                each(here)
            trial = self._inside(here[active] + _per(stride[active], along) * along[active])
            values, slopes = evaluate(trial, active)
            log.see(active, trial, values)
            step = trial - here[active]
            gain = 1e-4 * _dot(slope[active], step)
            accepted = values <= torch.where(value[active].isfinite(), value[active] + gain, values)
            yes, no = active[accepted], active[~accepted]
            pairs.add(yes, step[accepted], slopes[accepted] - slope[yes], known=value[yes].isfinite())
            here[yes], value[yes], slope[yes] = trial[accepted], values[accepted], slopes[accepted]
            stuck[yes], stuck[no] = 0, stuck[no] + 1
            stride[no] *= 0.3
            pairs.forget(no[stuck[no] == 6])
            fresh = torch.cat([yes, no[stuck[no] == 6]])
            along[fresh], stride[fresh] = self._direction(here[fresh], slope[fresh], pairs, fresh)
            log.tell(iteration + 1, {})
            active = active[~(log.done()[active] | (stuck[active] >= 14) | (log.value[active] < self.enough))]
            if not len(active):
                break
        return log.end()

    def _inside(self, trials: Tensor) -> Tensor:
        return trials.clamp(0, 1) if self.box else trials

    def _direction(self, here: Tensor, slope: Tensor, pairs: _Pairs, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Where to go and how far first; entries that the box holds back stay."""
        free = torch.ones_like(here, dtype=torch.bool)
        if self.box:
            free = ~(((here <= 0) & (slope > 0)) | ((here >= 1) & (slope < 0)))
        along, known = pairs.apply(slope * free, rows)
        along = -along * free
        uphill = _dot(along, slope) >= 0
        along = torch.where(_per(uphill, along), -slope * free, along)
        longest = along.flatten(1).abs().amax(1).clamp_min(torch.finfo(along.dtype).tiny)
        return along, torch.where(uphill | ~known, self.first / longest, torch.ones_like(longest))


class _Pairs:
    """Steps and changes of slope of every problem, newest last; the two-loop recursion over them."""

    def __init__(self, like: Tensor, history: int) -> None:
        self._steps = torch.zeros((history, *like.shape), dtype=like.dtype, device=like.device)
        self._turns = torch.zeros_like(self._steps)
        self._inverse = torch.zeros((history, len(like)), dtype=like.dtype, device=like.device)

    def add(self, rows: Tensor, step: Tensor, turn: Tensor, *, known: Tensor) -> None:
        bend = _dot(step, turn)
        good = known & (bend > 1e-10 * _dot(turn, turn).sqrt() * _dot(step, step).sqrt())
        rows, step, turn, bend = rows[good], step[good], turn[good], bend[good]
        for kept, new in ((self._steps, step), (self._turns, turn), (self._inverse, 1 / bend)):
            kept[:-1, rows] = kept[1:, rows].clone()
            kept[-1, rows] = new

    def forget(self, rows: Tensor) -> None:
        self._inverse[:, rows] = 0

    def apply(self, slope: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        """The inverse Hessian times ``slope``, and for which rows anything is known of it."""
        steps, turns, inverse = self._steps[:, rows], self._turns[:, rows], self._inverse[:, rows]
        known = inverse[-1] > 0
        shares = []
        for s, y, r in zip(steps.flip(0), turns.flip(0), inverse.flip(0), strict=True):
            share = r * _dot(s, slope)
            slope = slope - _per(share, slope) * y
            shares.append(share)
        scale = torch.where(known, 1 / (inverse[-1] * _dot(turns[-1], turns[-1])).clamp_min(1e-30), torch.ones_like(inverse[-1]))
        slope = _per(scale, slope) * slope
        for s, y, r, share in zip(steps, turns, inverse, reversed(shares), strict=True):
            slope = slope + _per(share - r * _dot(y, slope), slope) * s
        return slope, known


def _dot(one: Tensor, other: Tensor) -> Tensor:
    return (one.flatten(1) * other.flatten(1)).sum(1)


def _per(value: Tensor, like: Tensor) -> Tensor:
    """``(A,)`` made to multiply ``(A, …)``."""
    return value.view(-1, *[1] * (like.dim() - 1))


Optimiser = Adam | LBFGS
