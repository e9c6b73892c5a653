from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flpriv.attacks.membership.loss_threshold import LossThreshold
from flpriv.attacks.membership.modified_entropy import ModifiedEntropy
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.measures.membership import auc, null_error
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can

Federation = tuple[Capture, Tensor]


def scores(capture: Capture) -> Tensor:
    (claim,) = ModifiedEntropy()(capture)
    assert isinstance(claim, Membership)
    return claim.scores


def test_it_is_its_formula() -> None:
    task = Task(modality="x", shape=(1, 8, 8), classes=("a", "b", "c", "d"), model="cnn", options={"width": 4})
    rng = torch.Generator().manual_seed(0)
    own = Records(images=torch.rand(12, *task.shape, generator=rng), labels=torch.randint(4, (12,), generator=rng))
    model = task.build(seed=1)
    state = {key: value * 3 for key, value in model.state_dict().items()}
    model.load_state_dict(state)
    expected = []
    for p, label in zip(torch.softmax(model.eval()(own.images).double(), 1).tolist(), own.labels.tolist(), strict=True):
        others = sum(q * math.log(1 - q) for place, q in enumerate(p) if place != label)
        expected.append((1 - p[label]) * math.log(p[label]) + others)
    granted = Can.SEE_FINAL | Can.KNOW_CANDIDATES
    assert scores(Capture(granted=granted, task=task, models=(state,), candidates=own)).tolist() == pytest.approx(
        expected, abs=1e-6
    )


def test_with_two_classes_it_ranks_as_the_loss(overfit: Federation) -> None:
    (loss,) = LossThreshold()(overfit[0])
    assert isinstance(loss, Membership)
    assert torch.equal(scores(overfit[0]).argsort(), loss.scores.argsort())


def test_certain_predictions_are_finite(overfit: Federation) -> None:
    capture, _ = overfit
    sure = {key: value * 1000 if key.startswith("fc") else value for key, value in capture.final.items()}
    assert bool(scores(replace(capture, models=(sure,))).isfinite().all())


def test_overfit_and_untrained(overfit: Federation) -> None:
    capture, owner = overfit
    member = (owner > 0).numpy()
    assert auc(scores(capture).numpy(), member) > 0.65
    untrained = replace(capture, models=(capture.task.build(seed=5).state_dict(),))
    assert abs(auc(scores(untrained).numpy(), member) - 0.5) <= 2 * null_error(80, 80)
    with pytest.raises(CaptureError, match="no candidates"):
        ModifiedEntropy()(replace(capture, candidates=None))
