from __future__ import annotations

from pathlib import Path
from typing import Literal

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.search import LBFGS, Adam, Evaluate, Found, Optimiser, Schedule
from flpriv.progress import listen
from flpriv.scratch import scratch

GOALS = torch.tensor([[[0.2, 0.7], [0.9, 0.4]], [[0.5, 0.1], [0.3, 0.8]], [[1.0, 0.0], [0.6, 0.6]]])
START = torch.full_like(GOALS, 0.5)
BOTH = pytest.mark.parametrize("optimiser", [Adam(), LBFGS()], ids=["adam", "lbfgs"])


def bowls(goals: Tensor = GOALS, scale: float = 1.0) -> Evaluate:
    """One ill-conditioned bowl for each problem."""
    steep = torch.tensor([1.0, 30.0])

    def evaluate(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        apart = (trials - goals[rows]) * steep
        return scale * apart.square().flatten(1).sum(1), scale * 2 * apart * steep

    return evaluate


def valley(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rosenbrock's function, its lowest point at (1, 1)."""
    x, y = trials[:, 0], trials[:, 1]
    slopes = torch.stack([-2 * (1 - x) - 400 * x * (y - x**2), 200 * (y - x**2)], 1)
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2, slopes


def find(optimiser: Optimiser, evaluate: Evaluate, start: Tensor, *, iterations: int = 300, key: str = "") -> Found:
    rng = torch.Generator().manual_seed(0)
    return optimiser.minimise(evaluate, start, iterations=iterations, rng=rng, what="test", key={"key": key})


@BOTH
def test_every_problem_ends_at_its_own_goal(optimiser: Optimiser) -> None:
    found = find(optimiser, bowls(), START)
    assert torch.allclose(found.trials, GOALS, atol=5e-3)
    assert bool((found.objective < 1e-2).all())


@BOTH
def test_problems_do_not_see_each_other(optimiser: Optimiser) -> None:
    together = find(optimiser, bowls(), START)
    for place in range(len(GOALS)):
        alone = find(optimiser, bowls(GOALS[place : place + 1]), START[:1])
        assert torch.allclose(together.trials[place], alone.trials[0], atol=1e-6)
        assert together.evaluations[place] == alone.evaluations[0]


@BOTH
def test_trials_stay_in_the_box(optimiser: Optimiser) -> None:
    seen: list[Tensor] = []
    inside = bowls(GOALS * 3 - 1)

    def evaluate(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        seen.append(trials)
        return inside(trials, rows)

    found = find(optimiser, evaluate, START)
    assert torch.allclose(found.trials, (GOALS * 3 - 1).clamp(0, 1), atol=5e-3)
    assert all(bool(((t >= 0) & (t <= 1)).all()) for t in seen)


@BOTH
def test_the_answer_is_the_best_trial_met(optimiser: Optimiser) -> None:
    seen: list[Tensor] = []
    plain = bowls()

    def evaluate(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        values, slopes = plain(trials, rows)
        seen.append(torch.full((len(GOALS),), torch.inf).index_copy(0, rows, values))
        return values, slopes

    found = find(optimiser, evaluate, START, iterations=7)
    assert torch.equal(found.objective, torch.stack(seen).amin(0))
    assert torch.equal(plain(found.trials, torch.arange(3))[0], found.objective)


def test_lbfgs_follows_a_curved_valley() -> None:
    found = find(LBFGS(box=False), valley, torch.tensor([[-1.2, 1.0], [2.0, -1.0]]), iterations=150)
    assert torch.allclose(found.trials, torch.ones(2, 2), atol=1e-3)


@pytest.mark.parametrize("scale", [1e-6, 1e6])
def test_lbfgs_does_not_depend_on_the_objectives_scale(scale: float) -> None:
    assert torch.allclose(find(LBFGS(), bowls(scale=scale), START).trials, GOALS, atol=1e-3)


@BOTH
def test_a_problem_that_is_solved_is_not_evaluated_further(optimiser: Optimiser) -> None:
    found = find(optimiser, bowls(), START, iterations=5000)
    assert int(found.evaluations.max()) < 2500


@pytest.mark.parametrize("signed", ["hard", "soft", "none"])
@pytest.mark.parametrize("schedule", ["step", "cosine"])
def test_adams_variants_arrive(signed: Literal["hard", "soft", "none"], schedule: Schedule) -> None:
    optimiser = Adam(signed=signed, schedule=schedule, warmup=5)
    assert torch.allclose(find(optimiser, bowls(), START).trials, GOALS, atol=2e-2)


def test_langevin_noise_comes_from_the_generator() -> None:
    noisy = [find(Adam(langevin=1.0, signed="none"), bowls(), START, iterations=20) for _ in range(2)]
    assert torch.equal(noisy[0].trials, noisy[1].trials)
    assert not torch.equal(noisy[0].trials, find(Adam(signed="none"), bowls(), START, iterations=20).trials)


@BOTH
def test_an_interrupted_search_goes_on(optimiser: Optimiser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 60))
    monkeypatch.setattr("flpriv.attacks.inversion.search.time.monotonic", lambda: next(clock))
    calls = 0
    plain = bowls()

    def interrupted(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 30:
            raise KeyboardInterrupt
        return plain(trials, rows)

    with scratch(tmp_path / "scratch"):
        with pytest.raises(KeyboardInterrupt):
            find(optimiser, interrupted, START)
        (left,) = (tmp_path / "scratch").iterdir()
        assert left.stat().st_mode & 0o777 == 0o600 and left.parent.stat().st_mode & 0o777 == 0o700
        other = find(optimiser, plain, START, key="other")
        found = find(optimiser, plain, START)
        assert not list((tmp_path / "scratch").iterdir())
    whole = find(optimiser, plain, START)
    assert torch.equal(other.trials, whole.trials)
    assert torch.allclose(found.trials, GOALS, atol=5e-3)
    if isinstance(optimiser, Adam):
        assert torch.equal(found.trials, whole.trials) and torch.equal(found.objective, whole.objective)


def test_progress_tells_the_objective() -> None:
    told: list[str] = []
    with listen(lambda what, done, total, note: told.append(note)):
        find(Adam(), bowls(), START, iterations=40)
    assert len(told) == 2 and all(note.startswith("objective ") for note in told)


def test_a_cosine_ends_at_its_floor() -> None:
    start = torch.full((1, 1), 0.0)

    def slope(trials: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        return -trials.flatten(1).sum(1), torch.full_like(trials, -1.0)

    def reached(floor: float) -> float:
        search = Adam(lr=0.01, signed="none", schedule="cosine", floor=floor, box=False)
        return float(search.minimise(slope, start, iterations=100, rng=torch.Generator(), what="test").trials)

    assert [reached(floor) for floor in (0.0, 0.5, 1.0)] == [pytest.approx(expected, rel=0.02) for expected in (0.5, 0.75, 1.0)]
