from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import mse_loss

from flpriv.attacks.site.age_regression import AgeRegression
from flpriv.capture import Capture
from flpriv.claim import Estimate, Goal
from flpriv.errors import CaptureError, ThreatError
from flpriv.measures import measure
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="age-regression", goal=Goal.ATTRIBUTE, setting="none", defense="none")
TASK = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn", options={"width": 8})
GRANTED = Can.SEE_FINAL | Can.KNOW_EXPOSED | Can.KNOW_CANDIDATES
STRIPES = torch.eye(4).repeat(4, 4) - torch.eye(4).flip(0).repeat(4, 4)


def people(count: int, *, seed: int, trace: float) -> Records:
    """Noise in which age leaves a pattern without a mark on any pixel statistic."""
    rng = torch.Generator().manual_seed(seed)
    age = 20 + 70 * torch.rand(count, generator=rng)
    mark = trace * ((age - 55) / 35)[:, None, None, None] * STRIPES
    return Records(
        images=(0.5 + mark + 0.1 * torch.randn(count, 1, 16, 16, generator=rng)).clamp(0, 1),
        labels=(age > 55).long(),
        patients=tuple(f"{seed}-{i}" for i in range(count)),
        attributes={"age": tuple("" if i % 9 == 8 else f"{value:.1f}" for i, value in enumerate(age.tolist()))},
    )


def capture(trained_on: Records | None, *, trace: float) -> tuple[Capture, Truth]:
    model = TASK.build(seed=1)
    if trained_on is not None:
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        age = torch.tensor([float(value or 55) for value in trained_on.attributes["age"]])
        for _ in range(30):
            for rows in torch.split(torch.arange(len(age)), 50):
                optimizer.zero_grad()
                torch.autograd.backward(mse_loss(model(trained_on.images[rows])[:, 0], (age[rows] - 55) / 20))
                optimizer.step()
    asked = people(200, seed=2, trace=trace)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    seen = Capture(
        granted=GRANTED, task=TASK, models=(state,), exposed=people(60, seed=1, trace=trace), candidates=asked.anonymous()
    )
    return seen, Truth(candidates=asked, members=torch.zeros(200, dtype=torch.bool))


def test_a_planted_trace_of_age_is_read_beyond_every_baseline() -> None:
    seen, truth = capture(people(300, seed=3, trace=0.05), trace=0.05)
    found = judge(AgeRegression(repeats=2)(seen), truth)[0]
    assert found.headline is not None
    assert found.headline.low is not None
    assert found.headline.null is not None
    assert found.headline.low > max(0.3, found.headline.null)


def test_without_a_trace_nothing_is_read() -> None:
    seen, truth = capture(None, trace=0)
    found = judge(AgeRegression(repeats=2)(seen), truth)[0]
    assert found.headline is not None
    assert found.headline.value is not None
    assert found.headline.value < 0.1


def test_every_baseline_comes_with_the_same_probes() -> None:
    seen, _ = capture(None, trace=0)
    claims = [claim for claim in AgeRegression(repeats=3, epochs=1)(seen) if isinstance(claim, Estimate)]
    counts: dict[tuple[str, str], int] = {}
    for claim in claims:
        counts[claim.baseline, claim.probe] = counts.get((claim.baseline, claim.probe), 0) + 1
    assert counts == {
        ("mean age", "mean"): 1,
        ("", "head"): 3,
        ("", "ridge regression"): 1,
        ("untrained backbone", "head"): 3,
        ("untrained backbone", "ridge regression"): 3,
        ("pixel statistics", "head"): 3,
        ("pixel statistics", "ridge regression"): 1,
    }


def test_what_is_missing_is_named() -> None:
    seen, _ = capture(None, trace=0)
    assert seen.exposed is not None
    with pytest.raises(CaptureError, match="0 exposed records tell their age, 8 are needed"):
        AgeRegression()(replace(seen, exposed=seen.exposed.anonymous()))
    with pytest.raises(CaptureError, match="no candidates"):
        AgeRegression()(replace(seen, candidates=None))
    with pytest.raises(ThreatError, match="know-exposed"):
        AgeRegression()(replace(seen, granted=GRANTED & ~Can.KNOW_EXPOSED))
