from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.bn_aware import BNAware
from flpriv.attacks.inversion.evidence import gather
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
BATCH = LocalRecipe(lr=0.02, batch_size=2, steps=1)


def found(capture: Capture, **options: Any) -> torch.Tensor:
    (claim,) = BNAware(exact=False, device="cpu", **options)(capture, seed=0)
    assert isinstance(claim, Reconstruction)
    return claim.images


def test_the_statistics_of_the_update_bring_a_batch_back(federate: Make, smooth: Make, psnr: Make, shallow: str) -> None:
    """Train mode: the same search without them, and with another batch's, stays far behind."""
    done = federate(smooth(2, seed=3), recipe=BATCH, model=shallow, public=smooth(12, seed=9))
    other = federate(smooth(2, seed=4), recipe=BATCH, model=shallow)
    (seen,), (wrong,) = done.capture.observations, other.capture.observations
    foreign = {name: (wrong if "running" in name else seen).returned[name] for name in seen.returned}
    misled = replace(done.capture, observations=(replace(seen, returned=foreign),))
    own, without, others = (
        psnr(found(capture, iterations=150, bn=bn), done.used.images).mean().item()
        for capture, bn in ((done.capture, 1.0), (done.capture, 0.0), (misled, 1.0))
    )
    assert own >= 22
    assert own > without + 5 and own > others + 5


def test_a_site_in_eval_mode_leaves_no_statistics(federate: Make, smooth: Make, psnr: Make, shallow: str) -> None:
    recipe = replace(BATCH, batch_size=1, train_mode=False)
    done = federate(smooth(1, seed=3), recipe=recipe, model=shallow, before=smooth(16, seed=5), public=smooth(12, seed=9))
    rng = torch.Generator().manual_seed(0)
    seen = gather(
        done.capture, done.capture.observations[0], rng=rng, device=torch.device("cpu"), max_steps=1, max_images=1, who="test"
    )
    assert BNAware().plan(seen, done.capture, rng=rng).hints == ()
    assert psnr(found(done.capture, iterations=150), done.used.images).item() >= 25


@pytest.mark.parametrize("held", [True, False])
def test_it_begins_at_the_mean_public_image_or_at_grey(federate: Make, smooth: Make, held: bool) -> None:
    public = smooth(12, seed=9)
    done = federate(smooth(1), public=public if held else None)
    rng = torch.Generator().manual_seed(0)
    seen = gather(
        done.capture, done.capture.observations[0], rng=rng, device=torch.device("cpu"), max_steps=1, max_images=1, who="test"
    )
    trial = BNAware().plan(seen, done.capture, rng=rng).start((1, 1, 16, 16), rng)[0]
    expected = public.images.mean(0) if held else torch.full((1, 16, 16), 0.5)
    assert (trial - expected).square().mean().sqrt() < (0.03 if held else 0.15)
