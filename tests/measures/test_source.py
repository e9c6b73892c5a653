from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from sklearn.metrics import accuracy_score, confusion_matrix
from torch.nn.functional import one_hot

from flpriv import risk
from flpriv.claim import Attribute, Goal
from flpriv.errors import ClaimError
from flpriv.finding import Level
from flpriv.measures import measure
from flpriv.measures.intervals import clopper_pearson
from flpriv.records import Records
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="b", goal=Goal.ATTRIBUTE, setting="none", defense="none")
NODES = {91: "east", 17: "north", 53: "west"}
PLACES = tuple(NODES.values())


def known(codes: list[int], members: list[bool], *, patients: tuple[str, ...] = (), labels: list[int] | None = None) -> Truth:
    n = len(codes)
    records = Records(
        images=torch.zeros(n, 1, 2, 2),
        labels=torch.tensor(labels or [0] * n),
        patients=patients or tuple(map(str, range(n))),
        attributes={"site": tuple(PLACES[code] for code in codes)},
    )
    return Truth(candidates=records, members=torch.tensor(members), site_of=NODES)


def guess(codes: list[int], *, classes: tuple[str, ...] = tuple(map(str, NODES))) -> Attribute:
    rows = one_hot(torch.tensor(codes), len(classes)).double()
    return Attribute(attribute="source", classes=classes, probabilities=rows, probe="loss")


def drawn(n: int = 240) -> tuple[list[int], list[int], list[bool]]:
    rng = np.random.default_rng(0)
    true = rng.choice(3, size=n, p=[0.5, 0.3, 0.2])
    own = np.where(rng.random(n) < 0.6, true, rng.integers(3, size=n))
    return true.tolist(), own.tolist(), (np.arange(n) % 2 == 0).tolist()


def test_members_alone_are_scored_and_nodes_are_sites() -> None:
    true, own, members = drawn()
    overall, *sites = judge([guess(own)], known(true, members))
    kept, found = true[::2], own[::2]
    head = overall.headline
    assert head is not None
    assert head.name == "accuracy on members"
    assert head.value == pytest.approx(accuracy_score(kept, found))
    assert (head.low, head.high) == pytest.approx(clopper_pearson(sum(np.equal(kept, found)), 120))
    assert head.null == pytest.approx(np.bincount(kept).max() / 120)
    assert head.null_name == "majority class"
    assert head.second_null == pytest.approx(1 / 3)
    assert head.second_null_name == "chance, 1 in 3 clients"
    assert overall.confusion is not None
    assert overall.confusion.classes == PLACES
    assert (overall.confusion.counts == confusion_matrix(kept, found)).all()
    assert [f.site for f in sites] == sorted(PLACES)
    for finding in sites:
        code = PLACES.index(finding.site)
        here = np.equal(kept, code)
        assert finding.headline is not None
        assert finding.headline.name == "recall"
        assert finding.headline.value == pytest.approx(np.equal(found, code)[here].mean())
        assert finding.headline.null == pytest.approx(here.mean())


def test_patients_make_the_interval_not_images() -> None:
    true, own, _ = drawn(40)
    many = [code for code in true for _ in range(4)], [code for code in own for _ in range(4)]
    apart = judge([guess(many[1])], known(many[0], [True] * 160))[0].headline
    together = judge([guess(many[1])], known(many[0], [True] * 160, patients=tuple(str(i // 4) for i in range(160))))[0].headline
    assert apart is not None
    assert together is not None
    assert apart.low is not None
    assert together.low is not None
    assert together.value == apart.value
    assert together.low < apart.low


def test_guesses_at_random_are_not_told_from_the_null() -> None:
    true, _, members = drawn()
    finding = judge([guess(np.random.default_rng(5).integers(3, size=240).tolist())], known(true, members))[0]
    assert risk.judge(finding).level is Level.NONE
    assert any("Not told apart" in caveat for caveat in finding.caveats)


def test_what_the_label_alone_tells_is_a_null() -> None:
    """Labels that name the site in two of three cases leave nothing to a model that only knows labels."""
    true, own, _ = drawn()
    labels = [code if code < 2 else 0 for code in true]
    overall = judge([guess(own)], known(true, [True] * 240, labels=labels))[0]
    assert overall.headline is not None
    assert overall.headline.null == pytest.approx(sum(code < 2 for code in true) / 240)
    assert overall.headline.null_name == "label alone"
    assert risk.judge(overall).level is Level.NONE
    west = next(f for f in judge([guess(own)], known(true, [True] * 240, labels=labels)) if f.site == "west")
    assert west.headline is not None
    assert west.headline.null == pytest.approx(true.count(2) / (true.count(0) + true.count(2)))


def test_a_site_without_a_reply_counts_as_wrong() -> None:
    finding = judge([guess([0] * 15 + [1] * 15, classes=("91", "17"))], known([0] * 15 + [2] * 15, [True] * 30))[0]
    assert finding.headline is not None
    assert finding.headline.value == 0.5
    assert finding.headline.second_null == 0.5
    assert "No reply of west was compared" in finding.caveats[0]
    stranger = judge([guess([0] * 30, classes=("5", "17"))], known([0] * 30, [True] * 30))[0]
    assert stranger.headline is not None
    assert stranger.headline.value == 0


def test_claims_that_do_not_fit_are_refused() -> None:
    true, own, members = drawn()
    truth = known(true, members)
    with pytest.raises(ClaimError, match="fix the round beforehand"):
        judge([guess(own), guess(own)], truth)
    with pytest.raises(ClaimError, match=r"shape \(4, 3\), expected \(240, 3\)"):
        judge([guess(own[:4])], truth)
    with pytest.raises(ClaimError, match="no candidate was trained on"):
        judge([guess(own)], known(true, [False] * 240))
    with pytest.raises(ClaimError, match="not known which candidates"):
        judge([guess(own)], Truth(candidates=truth.candidates))


def test_the_sentence_speaks_of_training_images() -> None:
    true, _, members = drawn()
    finding = risk.judge(judge([guess(true)], known(true, members))[0])
    assert "of training images" in risk.sentence([finding], "honest-but-curious")[1]


def test_records_dealt_out_to_nodes_belong_where_they_were_used() -> None:
    """In an arrangement a record's node is not its site: the witness knows, and records of no node are left out."""
    truth = known([0, 0, 1, 1, 2, 2], [True] * 6)
    assert truth.candidates is not None
    mixed = replace(truth.candidates, ids=tuple("abcdef"))
    used = {(1, 91): mixed.take([2, 3]), (1, 17): mixed.take([0, 4])}
    dealt = replace(truth, candidates=mixed, used=used, site_of={91: "mixed 1", 17: "mixed 2", 53: "mixed 3"})
    overall, *nodes = judge([guess([1, 0, 0, 1, 1, 0])], dealt)
    assert overall.headline is not None
    assert overall.headline.n == 4
    assert overall.headline.value == pytest.approx(3 / 4)
    assert [finding.site for finding in nodes] == ["mixed 1", "mixed 2"]
