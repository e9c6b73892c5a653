from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.search import Adam, Found
from flpriv.attacks.inversion.stages import carry_out

Make = Callable[..., Any]


def test_each_search_begins_where_the_last_one_ended(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1)).capture
    rng, device = torch.Generator().manual_seed(0), torch.device("cpu")
    evidence = gather(capture, capture.observations[0], rng=rng, device=device, max_steps=1, max_images=1, who="test")
    one = Plan(optimiser=Adam(lr=0.01, schedule="constant"), iterations=20)
    still = Plan(optimiser=Adam(lr=1e-9), iterations=1, start=lambda shape, rng: torch.full(shape, torch.nan))
    assert [len(plan.stages) for plan in (one, replace(one, then=still), replace(one, then=replace(one, then=still)))] == [
        1,
        2,
        3,
    ]

    def ended(plan: Plan) -> Found:
        rng = torch.Generator().manual_seed(1)
        labels = evidence.labels[None].expand(2, 1)
        return carry_out(plan, [evidence], labels, shape=(1, 1, 16, 16), rng=rng, what="test", key={})[1]

    alone, followed, twice = ended(one), ended(replace(one, then=still)), ended(replace(one, then=one))
    assert torch.allclose(followed.trials, alone.trials, atol=1e-6)
    assert bool((twice.objective < alone.objective).all())
