from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flpriv.attacks.inversion import batch_norm
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.regularisers import agreement
from flpriv.attacks.inversion.see_through_gradients import SeeThroughGradients
from flpriv.attacks.inversion.stages import carry_out
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
BATCH = LocalRecipe(lr=0.05, batch_size=4, steps=1, train_mode=False)
RESTARTS = 3


def evidence(done: Any) -> Evidence:
    cpu, rng = torch.device("cpu"), torch.Generator().manual_seed(0)
    return gather(done.capture, done.capture.observations[0], rng=rng, device=cpu, max_steps=9, max_images=9, who="test")


def searched(done: Any, *, restarts: int = RESTARTS, **options: Any) -> tuple[Tensor, Tensor]:
    """The images of every restart, ``(restarts, N, C, *spatial)``, and their labels."""
    rng, seen = torch.Generator().manual_seed(0), evidence(done)
    plan = SeeThroughGradients(restarts=restarts, **options).plan(seen, done.capture, rng=rng)
    shape = (seen.site.images, *done.capture.task.shape)
    given = seen.labels.expand(restarts, -1)
    problems, found = carry_out(plan, [seen], given, shape=shape, rng=rng, what="test", key={})
    return problems.images(found.trials), given


def test_group_consistency_draws_restarts_together_and_towards_the_images(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(4, seed=3), recipe=BATCH, grant=("know-labels",))

    def apart(group: float) -> tuple[float, float]:
        images, labels = searched(done, group=group, iterations=80)
        spread = (images - agreement(images, labels, restarts=RESTARTS)).square().mean().sqrt()
        return spread.item(), sum(float(psnr(one, done.used.images).mean()) for one in images) / RESTARTS

    (scattered, alone), (close, together) = apart(0.0), apart(10.0)
    assert close < 0.5 * scattered
    assert together > alone + 1


def test_the_prior_draws_images_to_what_the_model_has_seen(federate: Make, smooth: Make, psnr: Make, shallow: str) -> None:
    done = federate(smooth(4, seed=3), recipe=BATCH, model=shallow, before=smooth(32, seed=8))
    seen = evidence(done)
    penalty, known = batch_norm.apart(seen.site, seen.seen.sent), batch_norm.gathered(seen, seen.labels)
    free, kept = (searched(done, restarts=1, bn=bn, iterations=100)[0][0] for bn in (0.0, 1.0))
    assert penalty(kept, known) < penalty(free, known) - 0.1
    assert psnr(kept, done.used.images).mean() > psnr(free, done.used.images).mean() + 1


def test_no_prior_without_batch_norm_and_no_agreement_alone(federate: Make, smooth: Make, shallow: str) -> None:
    rng = torch.Generator().manual_seed(0)

    def planned(done: Any, **options: Any) -> tuple[int, float]:
        plan = SeeThroughGradients(**options).plan(evidence(done), done.capture, rng=rng)
        return len(plan.hints), plan.consensus

    assert planned(federate(smooth(1))) == (0, 1.0)
    assert planned(federate(smooth(1), model=shallow), restarts=1) == (1, 0.0)
