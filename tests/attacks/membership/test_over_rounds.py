"""What holds for every attack that reads updates or models over rounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.membership.fedmia_cosine import FedMIACosine
from flpriv.attacks.membership.fedmia_loss import FedMIALoss
from flpriv.attacks.membership.gradient_difference import GradientDifference
from flpriv.attacks.membership.gradient_norm import GradientNorm
from flpriv.attacks.membership.trajectory import Trajectory
from flpriv.attacks.membership.update_cosine import UpdateCosine
from flpriv.capture import Capture
from flpriv.claim import Membership
from flpriv.measures.membership import auc, null_error

Federation = tuple[Capture, Tensor]

ATTACKS = (
    FedMIACosine(spread=2),
    FedMIALoss(),
    GradientDifference(spread=2),
    GradientNorm(spread=2),
    Trajectory(),
    UpdateCosine(spread=2),
)


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.name)
def test_shuffled_membership_is_chance(four_sites: Federation, attack: Attack) -> None:
    """Of 100 shuffles at least 88 lie within two standard errors of one half; 95 do on average."""
    capture, owner = four_sites
    claim = attack(capture)[0]
    assert isinstance(claim, Membership)
    rng = torch.Generator().manual_seed(0)
    drawn = [owner[torch.randperm(len(owner), generator=rng)] > 0 for _ in range(100)]
    areas = [auc(claim.scores.numpy(), members.numpy()) for members in drawn]
    assert sum(abs(area - 0.5) <= 2 * null_error(160, 160) for area in areas) >= 88
