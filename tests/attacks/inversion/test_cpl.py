from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flpriv.attacks.inversion.cpl import CPL
from flpriv.attacks.inversion.evidence import gather
from flpriv.claim import Reconstruction

Make = Callable[..., Any]


def test_the_first_trial_is_a_pattern(federate: Make, smooth: Make) -> None:
    done = federate(smooth(1, (1, 20, 20)))
    rng = torch.Generator().manual_seed(0)
    seen = gather(
        done.capture, done.capture.observations[0], rng=rng, device=torch.device("cpu"), max_steps=1, max_images=1, who="test"
    )
    trial = CPL(tile=5).plan(seen, done.capture, rng=rng).start((1, 1, 20, 20), rng)
    assert torch.equal(trial[..., :5, :5].repeat(1, 1, 4, 4), trial)
    assert len(torch.unique(trial)) == 25


def test_a_strong_pull_towards_the_label_makes_the_model_surer_and_the_image_worse(
    federate: Make, smooth: Make, psnr: Make
) -> None:
    done = federate(smooth(1, (1, 16, 16), seed=3))
    model = done.capture.task.build(seed=0)

    def sure(label: float) -> tuple[float, float]:
        (claim,) = CPL(label=label, iterations=120, restarts=1, exact=False, device="cpu")(done.capture, seed=0)
        assert isinstance(claim, Reconstruction)
        share = model(claim.images).softmax(1)[0, done.used.labels[0]].item()
        return share, psnr(claim.images, done.used.images).item()

    (plain, good), (pulled, worse) = sure(0.0), sure(1.0)
    assert pulled > plain + 0.05
    assert worse < good - 10
