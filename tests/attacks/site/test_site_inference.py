from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.nn.functional import avg_pool2d, cross_entropy, interpolate

from flpriv.attacks.site.site_inference import SiteInference
from flpriv.capture import Capture
from flpriv.claim import Attribute, Goal
from flpriv.errors import CaptureError, ThreatError, UpdateError
from flpriv.finding import Finding
from flpriv.measures import measure
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="site-inference", goal=Goal.ATTRIBUTE, setting="none", defense="none")
TASK = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn", options={"width": 8})
SITES = ("north", "south", "west")
GRANTED = Can.SEE_FINAL | Can.KNOW_EXPOSED | Can.KNOW_CANDIDATES


def images(count: int, *, seed: int, trace: float) -> Records:
    """Noise, coarse and fine, of three sites; each leaves a fine pattern of the given strength, all of equal mean and edges."""
    rng = torch.Generator().manual_seed(seed)
    place = torch.randint(3, (count,), generator=rng)
    smooth = interpolate(avg_pool2d(torch.rand(count, 1, 16, 16, generator=rng), 4), size=(16, 16), mode="bilinear")
    diagonal, swapped = torch.eye(4).repeat(4, 4), torch.eye(4)[[0, 2, 1, 3]].repeat(4, 4)
    patterns = torch.stack([diagonal, diagonal.flip(0), swapped])
    fine = 0.1 * torch.randn(count, 1, 16, 16, generator=rng)
    return Records(
        images=(smooth + fine + trace * (patterns[place][:, None] - 0.25)).clamp(0, 1),
        labels=torch.randint(2, (count,), generator=rng),
        patients=tuple(f"{seed}-{i}" for i in range(count)),
        attributes={
            "site": tuple(SITES[i] for i in place.tolist()),
            "sex": tuple("FM"[i % 2] if i % 5 else "" for i in range(count)),
            "age": tuple(str(20 + i % 70) for i in range(count)),
        },
    )


def capture(exposed: Records, asked: Records, *, trained_on: Records | None = None) -> Capture:
    """The final model: untrained, or trained to tell the last site from the others, the strongest trace a task can leave."""
    model = TASK.build(seed=1)
    if trained_on is not None:
        site = torch.tensor([int(name == SITES[2]) for name in trained_on.attributes["site"]])
        optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
        for _ in range(30):
            for rows in torch.split(torch.arange(len(site)), 60):
                optimizer.zero_grad()
                torch.autograd.backward(cross_entropy(model(trained_on.images[rows]), site[rows]))
                optimizer.step()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    return Capture(granted=GRANTED, task=TASK, models=(state,), exposed=exposed, candidates=asked.anonymous())


def claims(attack: SiteInference, seen: Capture, *, seed: int = 0) -> list[Attribute]:
    made = attack(seen, seed=seed)
    found = [claim for claim in made if isinstance(claim, Attribute)]
    assert len(found) == len(made)
    return found


def truth(asked: Records) -> Truth:
    return Truth(candidates=asked, members=torch.zeros(len(asked), dtype=torch.bool))


def lift(finding: Finding) -> float:
    """The lower end of the lift's interval."""
    low = next(metric.low for metric in finding.metrics if metric.name.startswith("lift"))
    assert low is not None
    return low


def test_a_planted_site_signal_is_found_with_lift_over_every_baseline() -> None:
    exposed, asked, more = (images(n, seed=seed, trace=0.08) for seed, n in enumerate((90, 300, 600)))
    overall, *sites = judge(claims(SiteInference(repeats=2), capture(exposed, asked, trained_on=more)), truth(asked))
    assert overall.headline is not None
    assert overall.headline.low is not None
    assert overall.confusion is not None
    assert set(overall.confusion.baselines) == {"majority class", "untrained backbone", "pixel statistics"}
    assert overall.headline.low > max(overall.confusion.baselines.values())
    assert lift(overall) > 0
    assert [finding.site for finding in sites] == sorted(SITES)


def test_pixel_statistics_that_tell_the_site_leave_no_lift() -> None:
    """A site with brighter images: everything finds it, so that the trained model adds nothing."""
    exposed, asked = images(90, seed=0, trace=0), images(200, seed=1, trace=0)
    brighter = [
        replace(
            part,
            images=part.images * 0.5 + 0.2 * torch.tensor([SITES.index(s) for s in part.attributes["site"]])[:, None, None, None],
        )
        for part in (exposed, asked)
    ]
    overall = judge(claims(SiteInference(repeats=2), capture(brighter[0], brighter[1])), truth(brighter[1]))[0]
    assert overall.headline is not None
    assert overall.headline.value is not None
    assert overall.headline.value > 0.9
    assert lift(overall) <= 0
    assert any("Not told apart from the baseline" in caveat for caveat in overall.caveats)


def test_no_signal_stays_at_the_baseline() -> None:
    exposed, asked = images(120, seed=0, trace=0), images(200, seed=1, trace=0)
    overall = judge(claims(SiteInference(repeats=2), capture(exposed, asked)), truth(asked))[0]
    assert overall.headline is not None
    assert overall.headline.low is not None
    assert overall.headline.null is not None
    assert overall.headline.low <= overall.headline.null
    assert lift(overall) <= 0


def test_every_baseline_comes_with_the_same_probes_and_repeats() -> None:
    exposed, asked = images(40, seed=0, trace=0.3), images(10, seed=1, trace=0.3)
    made = claims(SiteInference(epochs=1), capture(exposed, asked))
    kinds: dict[tuple[str, str], list[int]] = {}
    for claim in made:
        kinds.setdefault((claim.baseline, claim.probe), []).append(claim.repeat)
    assert kinds == {
        ("", "head"): [0, 1, 2, 3, 4],
        ("", "logistic probe"): [0],
        ("untrained backbone", "head"): [0, 1, 2, 3, 4],
        ("untrained backbone", "logistic probe"): [0, 1, 2, 3, 4],
        ("pixel statistics", "head"): [0, 1, 2, 3, 4],
        ("pixel statistics", "logistic probe"): [0],
    }
    assert all(claim.classes == tuple(sorted(SITES)) for claim in made)
    untrained = [c.probabilities for c in made if (c.baseline, c.probe) == ("untrained backbone", "logistic probe")]
    assert not torch.equal(untrained[0], untrained[1])


def test_equal_seeds_give_equal_claims() -> None:
    seen = capture(images(40, seed=0, trace=0.3), images(10, seed=1, trace=0.3))
    attack = SiteInference(repeats=1, epochs=2)
    one, two, other = (claims(attack, seen, seed=seed) for seed in (3, 3, 4))
    assert all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(one, two, strict=True))
    assert not all(torch.equal(a.probabilities, b.probabilities) for a, b in zip(one, other, strict=True))


def test_sex_leaves_unknown_out_and_age_is_guessed_in_bands() -> None:
    exposed, asked = images(60, seed=0, trace=0.3), images(80, seed=1, trace=0.3)
    seen = capture(exposed, asked)
    sexes = claims(SiteInference(attribute="sex", repeats=1, epochs=1), seen)
    assert sexes[0].classes == ("F", "M")
    assert judge(sexes, truth(asked))[0].headline is not None
    ages = claims(SiteInference(attribute="age", repeats=1, epochs=1, edges=(30, 60, 95)), seen)
    assert ages[0].classes == ("0-29", "30-59", "60-94")
    overall = judge(ages, truth(asked))[0]
    assert overall.headline is not None
    assert overall.headline.n == 80


def test_every_weight_must_be_loaded() -> None:
    seen = capture(images(40, seed=0, trace=0.3), images(10, seed=1, trace=0.3))
    wrong = {key: value[:1] if key == "conv1.bias" else value for key, value in seen.final.items()}
    with pytest.raises(UpdateError, match=r"the final model: layer 'conv1.bias' has shape \(1,\), expected \(8,\)"):
        SiteInference(repeats=1)(replace(seen, models=(wrong,)))


def test_nothing_to_learn_from_is_refused() -> None:
    seen = capture(images(40, seed=0, trace=0.3), images(10, seed=1, trace=0.3))
    assert seen.exposed is not None
    blank = replace(seen, exposed=replace(seen.exposed, attributes={"site": ("north",) * 40}))
    with pytest.raises(CaptureError, match=r"fewer than two values of 'site' \(north\)"):
        SiteInference()(blank)
    with pytest.raises(CaptureError, match=r"fewer than two values of 'sex' \(none\)"):
        SiteInference(attribute="sex")(blank)
    with pytest.raises(CaptureError, match="no candidates"):
        SiteInference()(replace(seen, candidates=None))
    with pytest.raises(ThreatError, match="know-exposed"):
        SiteInference()(replace(seen, granted=GRANTED & ~Can.KNOW_EXPOSED))
