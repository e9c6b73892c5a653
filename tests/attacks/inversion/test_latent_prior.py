from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion import latent_prior
from flpriv.attacks.inversion.autoencoder import Autoencoder
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.latent_prior import LatentPrior
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import assemble
from flpriv.capture import Capture
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.testing import check_attack, glass

Make = Callable[..., Any]
CPU = torch.device("cpu")
SHORT: dict[str, Any] = {"iterations": 2, "coarse": 2, "rehearsed": 1, "simulated": 2, "training": 3, "exact": False}


def reading(capture: Capture) -> Evidence:
    rng = torch.Generator().manual_seed(0)
    return gather(capture, capture.observations[0], rng=rng, device=CPU, max_steps=1, max_images=1, who="test")


def test_it_keeps_its_contract() -> None:
    attack = LatentPrior(iterations=25, coarse=15, tv=0.003, simulated=3, training=5, exact=False)
    check_attack(attack, on=glass(Goal.RECONSTRUCTION, model="cnn"))


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8, 8)])
def test_one_computation_for_all_trials_comes_to_the_same(federate: Make, smooth: Make, shape: tuple[int, ...]) -> None:
    done = federate(smooth(1, shape))
    found = reading(done.capture)
    plan = Plan(space=Autoencoder(steps=3, batch=2).space(smooth(4, shape, seed=8).images, device=CPU))
    loop = assemble([found], found.labels.expand(3, 1), plan)
    trials = torch.stack([plan.space.encode(image[None], found.labels) for image in smooth(3, shape, seed=9).images])
    one, all = (problems(trials, torch.arange(3)) for problems in (loop, replace(loop, batched=True)))
    assert torch.allclose(one[0], all[0], atol=1e-5) and torch.allclose(one[1], all[1], atol=1e-4)
    assert float(one[1].abs().max()) > 0


def test_pixels_are_refined_from_what_the_decoder_found(federate: Make, xrays: Any, psnr: Make) -> None:
    public = replace(xrays.public, images=torch.nn.functional.avg_pool2d(xrays.public.images, 2))
    patient = replace(xrays.private, images=torch.nn.functional.avg_pool2d(xrays.private.images, 2)).take([0])
    done = federate(patient, public=public)
    found = []
    for iterations in (1, 60):
        (claim,) = LatentPrior(iterations=iterations, coarse=40, tv=0.001, restore=False, training=60, exact=False)(done.capture)
        assert isinstance(claim, Reconstruction)
        found.append(psnr(claim.images, done.used.images).item())
    assert 20 < found[0] < found[1] - 5, "latents bring the image near, pixels nearer"


def test_how_smooth_images_should_be_is_rehearsed(federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[list[str]] = []

    def fourth(plans: Mapping[str, Plan], *args: Any, **options: Any) -> str:
        asked.append(list(plans))
        return list(plans)[3]

    capture = federate(smooth(1), public=smooth(4, seed=8)).capture
    given = LatentPrior(**SHORT, tv=0.2).plan(reading(capture), capture, rng=torch.Generator())
    monkeypatch.setattr(latent_prior, "best", fourth)
    chosen = LatentPrior(**SHORT).plan(reading(capture), capture, rng=torch.Generator())
    assert asked == [["tv=0.001", "tv=0.003", "tv=0.01", "tv=0.03", "tv=0.1"]]
    assert [[stage.regularisers[0][0] for stage in plan.stages] for plan in (given, chosen)] == [[0.2, 0.2], [0.03, 0.03]]


def test_volumes(federate: Make, smooth: Make) -> None:
    done = federate(smooth(1, (1, 10, 12, 9)), public=smooth(4, (1, 10, 12, 9), seed=8))
    (claim,) = LatentPrior(**SHORT)(done.capture)
    assert isinstance(claim, Reconstruction) and claim.images.shape == (1, 1, 10, 12, 9)


def test_it_asks_for_public_images(federate: Make, smooth: Make) -> None:
    with pytest.raises(FlprivError, match="latent-prior: learns from public images"):
        LatentPrior(**SHORT)(federate(smooth(1)).capture)
