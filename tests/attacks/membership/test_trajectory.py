from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
import torch
from torch import Tensor

from flpriv.attacks.membership.loss_threshold import LossThreshold
from flpriv.attacks.membership.trajectory import Trajectory
from flpriv.attacks.membership.update_cosine import UpdateCosine
from flpriv.capture import Capture, Observation
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.measures.membership import auc, null_error

Federation = tuple[Capture, Tensor]


def scores(capture: Capture, attack: Trajectory | LossThreshold | UpdateCosine) -> Tensor:
    claim = attack(capture)[0]
    assert isinstance(claim, Membership)
    assert claim.node is None
    return claim.scores


def test_the_loss_score_is_the_mean_over_the_trained_models(federated: Federation) -> None:
    capture, _ = federated
    each = [scores(replace(capture, models=(model,)), LossThreshold()) for model in capture.models[1:]]
    assert torch.allclose(scores(capture, Trajectory()), torch.stack(each).mean(0), atol=1e-12)
    assert torch.equal(scores(capture, Trajectory(spread=1)), each[-1])


def test_the_cosine_score_is_along_the_steps_of_the_global_model(federated: Federation) -> None:
    capture, _ = federated
    found = scores(replace(capture, models=capture.models[:2], observations=()), Trajectory(score="cosine"))
    step = Observation(round=1, node=5, sent=capture.models[0], returned=capture.models[1])
    node = UpdateCosine()(replace(capture, observations=(step,)))[1]
    assert isinstance(node, Membership)
    assert torch.allclose(found, node.scores, atol=1e-12)


@pytest.mark.parametrize("score", ["loss", "cosine"])
def test_an_overfit_federation_gives_its_members_away(overfit: Federation, score: Literal["loss", "cosine"]) -> None:
    assert auc(scores(overfit[0], Trajectory(score=score)).numpy(), (overfit[1] > 0).numpy()) > 0.65


@pytest.mark.parametrize("score", ["loss", "cosine"])
def test_untrained_models_tell_nothing(overfit: Federation, score: Literal["loss", "cosine"]) -> None:
    capture, owner = overfit
    untrained = replace(capture, models=tuple(capture.task.build(seed=seed).state_dict() for seed in (5, 6, 7)))
    found = scores(untrained, Trajectory(score=score))
    assert abs(auc(found.numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_it_needs_a_model_of_a_round(federated: Federation) -> None:
    with pytest.raises(CaptureError, match="no model of a round"):
        Trajectory()(replace(federated[0], models=federated[0].models[:1]))
