"""Attacks by reference models against their formulas in plain Python, and against what must hold of any of them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist, fmean, stdev

import pytest
import torch
from torch import Tensor

from flpriv.attacks.membership.calibrated_loss import CalibratedLoss
from flpriv.attacks.membership.lira import LiRA
from flpriv.attacks.membership.loss_threshold import LossThreshold
from flpriv.attacks.membership.references import Answers, ReferenceAttack
from flpriv.attacks.membership.rmia import RMIA
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.errors import CaptureError, ScenarioError, ThreatError
from flpriv.measures.membership import auc, null_error
from flpriv.recipe import LocalRecipe
from flpriv.scratch import scratch
from flpriv.threat import Can

Federation = tuple[Capture, Tensor]
Row = Sequence[float]
EVERY: tuple[ReferenceAttack, ...] = (CalibratedLoss(), LiRA(shadows=4), LiRA(shadows=4, online=True), RMIA(), RMIA(online=True))


def answers(*, references: int, records: int, classes: int = 3, seed: int = 0) -> Answers:
    rng = torch.Generator().manual_seed(seed)
    inside = torch.stack([torch.randperm(references, generator=rng) < references // 2 for _ in range(records)], 1)
    return Answers(
        logits=3 * torch.randn(1 + references, records, classes, generator=rng).double(),
        labels=torch.randint(classes, (records,), generator=rng),
        inside=inside,
    )


def softmax(logits: Row, temperature: float = 1.0) -> list[float]:
    raised = [math.exp(value / temperature) for value in logits]
    return [value / sum(raised) for value in raised]


def phi(logits: Row, label: int) -> float:
    p = softmax(logits)
    return math.log(p[label]) - math.log(sum(value for place, value in enumerate(p) if place != label))


def rows(of: Answers) -> list[tuple[int, list[Row], list[bool]]]:
    """(label, logits of each model, whether each reference model saw it), record by record."""
    found = []
    for place, label in enumerate(of.labels.tolist()):
        found.append((label, of.logits[:, place].tolist(), of.inside[:, place].tolist()))
    return found


def plain_lira(of: Answers, *, online: bool) -> list[float]:
    """Global standard deviations for few shadows, each record's own for many."""
    sides: list[tuple[float, list[float], list[float]]] = []
    for label, said, saw in rows(of):
        own, *others = (phi(logits, label) for logits in said)
        sides.append(
            (own, [v for v, s in zip(others, saw, strict=True) if s], [v for v, s in zip(others, saw, strict=True) if not s])
        )

    def spread(values: list[float], everyone: list[list[float]]) -> float:
        if len(of.inside) >= 64:
            return stdev(values)
        squares = sum((v - fmean(some)) ** 2 for some in everyone for v in some)
        return math.sqrt(squares / sum(len(some) - 1 for some in everyone))

    inner, outer = [i for _, i, _ in sides], [o for _, _, o in sides]
    found = []
    for own, seen, unseen in sides:
        out = NormalDist(fmean(unseen), spread(unseen, outer))
        if not online:
            found.append(math.log(out.cdf(own)))
            continue
        within = NormalDist(fmean(seen), spread(seen, inner))
        found.append(math.log(within.pdf(own)) - math.log(out.pdf(own)))
    return found


def plain_rmia(of: Answers, public: Answers, *, online: bool, a: float, gamma: float, temperature: float) -> list[float]:
    def ratio(label: int, said: list[Row], saw: list[bool], *, asked: bool) -> float:
        own, *others = (softmax(logits, temperature)[label] for logits in said)
        out = fmean(v for v, s in zip(others, saw, strict=True) if not s)
        if not online:
            return own / (0.5 * ((1 + a) * out + (1 - a)))
        if not asked:
            return own / out
        return own / ((out + fmean(v for v, s in zip(others, saw, strict=True) if s)) / 2)

    beaten = [ratio(*row, asked=False) for row in rows(public)]
    return [fmean(ratio(*row, asked=True) / other > gamma for other in beaten) for row in rows(of)]


@pytest.mark.parametrize("references", [4, 16, 64])
@pytest.mark.parametrize("online", [False, True])
def test_lira_is_its_formula(references: int, online: bool) -> None:
    of = answers(references=references, records=30)
    assert LiRA(online=online).score(of, None).tolist() == pytest.approx(plain_lira(of, online=online), rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("references", [4, 16])
@pytest.mark.parametrize("online", [False, True])
@pytest.mark.parametrize(("a", "gamma", "temperature"), [(0.33, 2.0, 2.0), (0.0, 1.0, 1.0), (1.0, 1.3, 4.0)])
def test_rmia_is_its_formula(references: int, online: bool, a: float, gamma: float, temperature: float) -> None:
    of, public = answers(references=references, records=30), answers(references=references, records=40, seed=1)
    attack = RMIA(online=online, a=a, gamma=gamma, temperature=temperature)
    expected = plain_rmia(of, public, online=online, a=a, gamma=gamma, temperature=temperature)
    assert attack.score(of, public).tolist() == pytest.approx(expected, abs=1e-6)


def test_calibrated_loss_is_its_formula() -> None:
    of = answers(references=6, records=20)
    expected = []
    for label, said, saw in rows(of):
        own, *others = (-math.log(softmax(logits)[label]) for logits in said)
        expected.append(fmean(v for v, s in zip(others, saw, strict=True) if not s) - own)
    assert CalibratedLoss().score(of, None).tolist() == pytest.approx(expected, abs=1e-9)


def test_a_z_that_every_shadow_saw_says_nothing() -> None:
    of, public = answers(references=4, records=30), answers(references=4, records=40, seed=1)
    spoilt = replace(public, inside=public.inside | (torch.arange(40) < 5))
    kept = replace(public, logits=public.logits[:, 5:], labels=public.labels[5:], inside=public.inside[:, 5:])
    assert torch.equal(RMIA().score(of, spoilt), RMIA().score(of, kept))
    with pytest.raises(CaptureError, match="every shadow was trained on every public image"):
        RMIA().score(of, replace(public, inside=torch.ones_like(public.inside)))


def test_rmia_ranks_what_the_share_of_few_public_images_ties() -> None:
    """Models that are sure of nothing beat no public image twofold; the records must not all tie."""
    of, public = answers(references=4, records=200, classes=2), answers(references=4, records=10, classes=2, seed=1)
    of, public = (replace(one, logits=one.logits / 10) for one in (of, public))
    found = RMIA().score(of, public)
    assert int((found < 1e-6).sum()) == 200
    assert len(set(found.tolist())) == 200


@pytest.fixture(scope="module")
def sure(overfit: Federation, tmp_path_factory: pytest.TempPathFactory) -> tuple[Federation, Path]:
    """An overfit federation whose recipe is known, and a place where all tests share its shadows."""
    capture, owner = overfit
    assert capture.candidates is not None
    rng = torch.Generator().manual_seed(5)
    public = replace(
        capture.candidates,
        images=torch.rand(60, *capture.task.shape, generator=rng),
        labels=torch.randint(2, (60,), generator=rng),
    )
    recipe = LocalRecipe(lr=0.3, batch_size=16, steps=40)
    told = tuple(replace(seen, local=recipe, examples=40) for seen in capture.observations)
    granted = capture.granted | Can.KNOW_PUBLIC | Can.KNOW_LOCAL
    return (replace(capture, granted=granted, public=public, observations=told), owner), tmp_path_factory.mktemp("run")


def scores(attack: ReferenceAttack, capture: Capture, place: Path) -> Tensor:
    with scratch(place / "own", shared=place):
        (claim,) = attack(capture)
    assert isinstance(claim, Membership)
    assert claim.node is None
    return claim.scores


@pytest.mark.parametrize("attack", EVERY, ids=str)
def test_an_overfit_federation_gives_its_members_away(attack: ReferenceAttack, sure: tuple[Federation, Path]) -> None:
    (capture, owner), place = sure
    assert auc(scores(attack, capture, place).numpy(), (owner > 0).numpy()) > 0.65


def test_rmia_at_four_references_is_no_worse_than_the_loss(sure: tuple[Federation, Path]) -> None:
    (capture, owner), place = sure
    (loss,) = LossThreshold()(capture)
    assert isinstance(loss, Membership)
    member = (owner > 0).numpy()
    assert auc(scores(RMIA(), capture, place).numpy(), member) >= auc(loss.scores.numpy(), member) - 0.01


@pytest.mark.parametrize("attack", EVERY, ids=str)
def test_an_untrained_model_tells_nothing(attack: ReferenceAttack, sure: tuple[Federation, Path]) -> None:
    (capture, owner), place = sure
    untrained = replace(capture, models=(*capture.models[:-1], capture.task.build(seed=5).state_dict()))
    assert abs(auc(scores(attack, untrained, place).numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_what_is_needed_is_named(known: Federation) -> None:
    capture, _ = known
    with pytest.raises(ThreatError, match="know-public"):
        RMIA()(replace(capture, granted=capture.granted & ~Can.KNOW_PUBLIC))
    with pytest.raises(CaptureError, match="rmia: compares with public images"):
        RMIA()(replace(capture, public=None))
    with pytest.raises(CaptureError, match="calibrated-loss: the capture holds no candidates"):
        CalibratedLoss()(replace(capture, candidates=None))
    for attack in (LiRA(shadows=4, online=True, pool="public"), RMIA(online=True, pool="public")):
        with pytest.raises(ScenarioError, match="set pool = 'candidates'"):
            attack(capture)


def test_who_saw_no_training_trains_shadows_at_one_place(known: Federation) -> None:
    capture, _ = known
    blind = replace(capture, observations=(), models=capture.models[-1:], granted=capture.granted & ~Can.SEE_MODELS)
    (claim,) = LiRA(shadows=4, epochs=1)(blind)
    assert isinstance(claim, Membership)
    assert claim.scores.shape == (160,)
    assert bool(claim.scores.isfinite().all())
