from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flpriv.attacks.membership.comparison import compared
from flpriv.attacks.membership.fedmia_cosine import FedMIACosine
from flpriv.attacks.membership.update_cosine import UpdateCosine
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.errors import CaptureError
from flpriv.measures.membership import auc, null_error

Federation = tuple[Capture, Tensor]


def claims(capture: Capture, attack: FedMIACosine | None = None) -> list[Membership]:
    made = (attack or FedMIACosine())(capture)
    found = [claim for claim in made if isinstance(claim, Membership)]
    assert len(found) == len(made)
    return found


def test_each_node_gives_its_own_members_away(four_sites: Federation) -> None:
    capture, owner = four_sites
    overall, *nodes = claims(capture)
    standard = [(claim.scores - claim.scores.mean()) / claim.scores.std() for claim in nodes]
    assert torch.allclose(overall.scores, torch.stack(standard).amax(0))
    assert [claim.node for claim in nodes] == [11, 12, 13, 14]
    for claim in nodes:
        own = owner.eq(claim.node or 0)
        asked = own | (owner == 0)
        assert auc(claim.scores[asked].numpy(), own[asked].numpy()) > 0.65
        assert 0 <= float(claim.scores.min()) <= float(claim.scores.max()) <= 1


def test_noise_for_updates_tells_nothing(four_sites: Federation) -> None:
    capture, owner = four_sites
    rng = torch.Generator().manual_seed(0)
    sent = capture.task.build(seed=8).state_dict()
    blind = tuple(
        replace(
            o, sent=sent, returned={key: value + 0.05 * torch.randn(value.shape, generator=rng) for key, value in sent.items()}
        )
        for o in capture.observations
    )
    overall, *_ = claims(replace(capture, observations=blind))
    assert abs(auc(overall.scores.numpy(), (owner > 0).numpy()) - 0.5) <= 2 * null_error(160, 160)


def test_two_clients_are_too_few_and_told_so(federated: Federation) -> None:
    with pytest.raises(CaptureError, match="at least two others, and no round has usable replies of 3 clients"):
        FedMIACosine()(federated[0])
    sums = tuple(replace(o, node=None) for o in federated[0].observations)
    with pytest.raises(CaptureError, match="3 clients"):
        FedMIACosine()(replace(federated[0], observations=sums))


def test_rounds_with_fewer_replies_are_left_out(four_sites: Federation) -> None:
    capture, _ = four_sites
    thinned = tuple(o for o in capture.observations if o.round != 2 or o.node in (11, 12))
    without = tuple(o for o in capture.observations if o.round != 2)
    attack = FedMIACosine(spread=2)
    some, expected = (claims(replace(capture, observations=seen), attack) for seen in (thinned, without))
    assert all(torch.equal(a.scores, b.scores) for a, b in zip(some, expected, strict=True))


def test_it_needs_candidates(four_sites: Federation) -> None:
    with pytest.raises(CaptureError, match="no candidates"):
        FedMIACosine()(replace(four_sites[0], candidates=None))


def test_scores_compare_the_cosines_of_one_round(four_sites: Federation) -> None:
    capture, _ = four_sites
    first = tuple(o for o in capture.observations if o.round == 1)
    made = UpdateCosine()(replace(capture, observations=first))[1:]
    cosines = {claim.node or 0: claim.scores for claim in made if isinstance(claim, Membership)}
    expected = compared({1: cosines}, trim=None)
    for claim in claims(replace(capture, observations=first))[1:]:
        assert torch.allclose(claim.scores, expected[claim.node][0], atol=1e-12)
