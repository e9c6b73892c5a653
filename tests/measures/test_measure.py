from __future__ import annotations

import pytest
import torch

from flpriv.claim import Goal, Membership
from flpriv.errors import ClaimError
from flpriv.measures import measure
from flpriv.truth import Truth


def test_claims_of_another_kind_than_the_goal_are_refused() -> None:
    claims = [Membership(scores=torch.zeros(2))]
    with pytest.raises(ClaimError, match="x: 1 of 1 claims are not of type Reconstruction"):
        measure(claims, Truth(), attack="a", name="x", goal=Goal.RECONSTRUCTION, setting="none", defense="none")


@pytest.mark.parametrize("goal", list(Goal))
def test_no_claim_is_no_finding(goal: Goal) -> None:
    with pytest.raises(ClaimError, match="x made no claim"):
        measure([], Truth(), attack="a", name="x", goal=goal, setting="none", defense="none")
