from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.update_cosine import UpdateCosine
from flpriv.capture import Capture, Observation
from flpriv.claim import Membership
from flpriv.errors import CaptureError, ThreatError
from flpriv.measures.membership import auc, null_error
from flpriv.threat import Can

Federation = tuple[Capture, Tensor]


def claims(capture: Capture, attack: UpdateCosine | None = None) -> list[Membership]:
    made = (attack or UpdateCosine())(capture)
    found = [claim for claim in made if isinstance(claim, Membership)]
    assert len(found) == len(made)
    return found


def fed_sgd(federation: Federation, row: int) -> Capture:
    """A node that took one step on the candidate at ``row`` alone."""
    capture, _ = federation
    assert capture.candidates is not None
    model = capture.task.build(seed=3)
    sent = {key: value.clone() for key, value in model.state_dict().items()}
    own = capture.candidates.take([row])
    torch.autograd.backward(cross_entropy(model(own.images), own.labels))
    returned = {key: sent[key] - 0.1 * p.grad for key, p in model.named_parameters() if p.grad is not None}
    return replace(capture, observations=(Observation(round=1, node=5, sent=sent, returned=returned),))


def test_the_record_behind_a_single_step_has_cosine_one(federated: Federation) -> None:
    overall, node = claims(fed_sgd(federated, 17))
    assert node.node == 5
    assert overall.node is None
    assert float(node.scores[17]) == pytest.approx(1, abs=1e-4)
    assert int(node.scores.argmax()) == int(overall.scores.argmax()) == 17
    assert float(node.scores.abs().max()) <= 1 + 1e-6


def test_each_node_gives_its_own_members_away(federated: Federation) -> None:
    capture, owner = federated
    overall, *nodes = claims(capture)
    assert auc(overall.scores.numpy(), (owner > 0).numpy()) > 0.6
    for claim in nodes:
        own = owner.eq(claim.node or 0)
        asked = own | (owner == 0)
        assert auc(claim.scores[asked].numpy(), own[asked].numpy()) > 0.65
    assert [claim.node for claim in nodes] == [11, 12]


def test_noise_for_updates_tells_nothing(federated: Federation) -> None:
    capture, owner = federated
    rng = torch.Generator().manual_seed(0)
    blind = tuple(
        replace(o, returned={key: value + 0.01 * torch.randn(value.shape, generator=rng) for key, value in o.sent.items()})
        for o in capture.observations
    )
    overall, *_ = claims(replace(capture, observations=blind))
    assert abs(auc(overall.scores.numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(80, 80)


def test_a_node_is_scored_by_the_mean_over_its_rounds(federated: Federation) -> None:
    capture, _ = federated
    made = {claim.node: claim.scores for claim in claims(capture)}
    each = []
    for round in (1, 2, 3):
        seen = tuple(o for o in capture.observations if o.round == round)
        each.append({claim.node: claim.scores for claim in claims(replace(capture, observations=seen))})
    for node in (11, 12):
        assert torch.allclose(made[node], torch.stack([found[node] for found in each]).mean(0), atol=1e-6)
    one, two = ((made[node] - made[node].mean()) / made[node].std() for node in (11, 12))
    assert torch.allclose(made[None], torch.maximum(one, two))


def test_rounds_are_spread_evenly(federated: Federation) -> None:
    capture, _ = federated
    ends = tuple(o for o in capture.observations if o.round != 2)
    some, expected = claims(capture, UpdateCosine(spread=2)), claims(replace(capture, observations=ends))
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(some, expected, strict=True))


def test_traps_and_unusable_updates_are_left_out(federated: Federation) -> None:
    capture, _ = federated
    first, *rest = capture.observations
    expected = claims(replace(capture, observations=tuple(rest)))
    broken = {key: torch.full_like(value, float("nan")) for key, value in first.returned.items()}
    trapped = {key: value * 2 for key, value in first.sent.items()}
    for bad in (
        replace(first, trap="imprint", sent=trapped),
        replace(first, returned=broken),
        replace(first, returned=first.sent),
    ):
        found = claims(replace(capture, observations=(bad, *rest)))
        assert all(torch.equal(a.scores, b.scores) for a, b in zip(found, expected, strict=True))
    with pytest.raises(CaptureError, match="no usable update"):
        UpdateCosine()(replace(capture, observations=(replace(first, trap="imprint"),)))


def test_a_sum_over_clients_is_a_claim_about_the_federation_alone(federated: Federation) -> None:
    capture, owner = federated
    total = tuple(
        Observation(round=i + 1, node=None, sent=before, returned=after)
        for i, (before, after) in enumerate(zip(capture.models, capture.models[1:], strict=False))
    )
    (claim,) = claims(replace(capture, observations=total))
    assert claim.node is None
    assert auc(claim.scores.numpy(), (owner > 0).numpy()) > 0.6


def test_it_needs_updates_and_candidates(federated: Federation) -> None:
    for can in (Can.SEE_UPDATES, Can.KNOW_CANDIDATES):
        with pytest.raises(ThreatError, match="which the threat model does not grant"):
            UpdateCosine()(replace(federated[0], granted=federated[0].granted & ~can))
    with pytest.raises(CaptureError, match="no candidates"):
        UpdateCosine()(replace(federated[0], candidates=None))
