from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.gradient_norm import GradientNorm
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.measures.membership import auc, null_error

Federation = tuple[Capture, Tensor]


def scores(capture: Capture, attack: GradientNorm | None = None) -> Tensor:
    (claim,) = (attack or GradientNorm())(capture)
    assert isinstance(claim, Membership)
    assert claim.node is None
    return claim.scores


def reference(capture: Capture, round: int, row: int) -> float:
    """Minus the squared norm, entry by entry."""
    assert capture.candidates is not None
    model = capture.task.build().double().eval()
    model.load_state_dict(dict(capture.models[round]))
    image, label = capture.candidates.images[row].double(), capture.candidates.labels[row]
    torch.autograd.backward(cross_entropy(model(image[None]), label[None]))
    entries = [float(entry) for p in model.parameters() if p.grad is not None for entry in p.grad.flatten()]
    return -sum(entry * entry for entry in entries)


def test_scores_are_mean_squared_norms_at_trained_models(federated: Federation) -> None:
    capture, _ = federated
    found = scores(capture)
    for row in (0, 33):
        expected = sum(reference(capture, round, row) for round in (1, 2, 3)) / 3
        assert float(found[row]) == pytest.approx(expected, rel=1e-5)
    last = scores(capture, GradientNorm(spread=1))
    assert float(last[5]) == pytest.approx(reference(capture, 3, 5), rel=1e-5)


def test_an_overfit_federation_gives_its_members_away(overfit: Federation) -> None:
    assert auc(scores(overfit[0]).numpy(), (overfit[1] > 0).numpy()) > 0.65


def test_untrained_models_tell_nothing(overfit: Federation) -> None:
    capture, owner = overfit
    untrained = replace(capture, models=tuple(capture.task.build(seed=seed).state_dict() for seed in (5, 6)))
    assert abs(auc(scores(untrained).numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_it_needs_candidates_and_a_model_of_a_round(federated: Federation) -> None:
    with pytest.raises(CaptureError, match="no candidates"):
        GradientNorm()(replace(federated[0], candidates=None))
    with pytest.raises(CaptureError, match="no model of a round"):
        GradientNorm()(replace(federated[0], models=federated[0].models[:1]))
