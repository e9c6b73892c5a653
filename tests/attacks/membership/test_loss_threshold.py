from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.loss_threshold import LossThreshold
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.errors import CaptureError, ThreatError, UpdateError
from flpriv.measures.membership import auc, null_error
from flpriv.records import Records
from flpriv.threat import Can

Federation = tuple[Capture, Tensor]


def scores(capture: Capture) -> Tensor:
    (claim,) = LossThreshold()(capture)
    assert isinstance(claim, Membership)
    assert claim.node is None
    return claim.scores


def test_scores_are_minus_the_final_models_losses_in_float64(overfit: Federation) -> None:
    capture, _ = overfit
    found = scores(capture)
    assert capture.candidates is not None
    model = capture.task.build().double().eval()
    model.load_state_dict({key: value.double() for key, value in capture.final.items()})
    expected = cross_entropy(model(capture.candidates.images.double()), capture.candidates.labels, reduction="none")
    assert found.dtype is torch.float64
    assert torch.allclose(found, -expected, atol=1e-5)


def test_an_overfit_model_gives_its_members_away(overfit: Federation) -> None:
    capture, owner = overfit
    assert auc(scores(capture).numpy(), (owner > 0).numpy()) > 0.65


def test_an_untrained_model_tells_nothing(overfit: Federation) -> None:
    capture, owner = overfit
    untrained = replace(capture, models=(capture.task.build(seed=5).state_dict(),))
    assert abs(auc(scores(untrained).numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_certain_predictions_do_not_all_tie(overfit: Federation) -> None:
    capture, _ = overfit
    sure = {key: value * 30 if key.startswith("fc") else value for key, value in capture.final.items()}
    right = scores(capture) > -0.2
    certain = scores(replace(capture, models=(sure,)))[right]
    assert float(certain.max()) > -1e-30
    assert len(set(certain.tolist())) == int(right.sum())


def test_it_needs_the_final_model_and_candidates(overfit: Federation) -> None:
    for can in (Can.SEE_FINAL, Can.KNOW_CANDIDATES):
        with pytest.raises(ThreatError, match="which the threat model does not grant"):
            LossThreshold()(replace(overfit[0], granted=overfit[0].granted & ~can))
    with pytest.raises(CaptureError, match="no candidates"):
        LossThreshold()(replace(overfit[0], candidates=None))


def test_every_weight_must_be_loaded(overfit: Federation) -> None:
    short = {key: value for key, value in overfit[0].final.items() if key != "conv2.bias"}
    with pytest.raises(UpdateError, match=r"loss-threshold: the final model: layer 'conv2.bias' is missing"):
        LossThreshold()(replace(overfit[0], models=(short,)))


def test_volumes_and_running_statistics_are_taken_as_they_are(overfit: Federation) -> None:
    task = replace(overfit[0].task, shape=(1, 16, 16, 16), model="resnet18", options={"widen": 0.125}, mean=0.5, std=0.2)
    rng = torch.Generator().manual_seed(0)
    few = Records(images=torch.rand(3, 1, 16, 16, 16, generator=rng), labels=torch.tensor([0, 1, 1]))
    capture = Capture(granted=Can.SEE_FINAL | Can.KNOW_CANDIDATES, task=task, models=(task.build().state_dict(),), candidates=few)
    alone = [scores(replace(capture, candidates=few.take([i]))) for i in range(3)]
    assert torch.allclose(scores(capture), torch.cat(alone), atol=1e-5)
