from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.modern_inverting_gradients import ModernInvertingGradients
from flpriv.attacks.inversion.plan import Plan
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]


def plan(done: Any, **options: Any) -> Plan:
    rng = torch.Generator().manual_seed(0)
    seen = gather(
        done.capture, done.capture.observations[0], rng=rng, device=torch.device("cpu"), max_steps=1, max_images=9, who="test"
    )
    return ModernInvertingGradients(**options).plan(seen, done.capture, rng=rng)


def test_it_goes_without_features_where_the_last_layer_tells_none(federate: Make, smooth: Make) -> None:
    assert len(plan(federate(smooth(1))).hints) == 1
    assert len(plan(federate(smooth(1), model="flpriv.testing:dense_net", options={"inputs": 256}, classes=3)).hints) == 1


def test_features_alone_pull_a_search_towards_the_image(federate: Make, smooth: Make, psnr: Make) -> None:
    """With a hundredth of the iterations that suffice, a strong feature prior is well ahead."""
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=1, train_mode=False)
    done = federate(smooth(1, (1, 16, 16), seed=3), recipe=recipe)

    def reached(feature: float) -> float:
        attack = ModernInvertingGradients(feature=feature, tv=0.0, iterations=60, exact=False, device="cpu")
        (claim,) = attack(done.capture, seed=0)
        assert isinstance(claim, Reconstruction)
        return float(psnr(claim.images, done.used.images))

    assert reached(100.0) > reached(0.0) + 3
