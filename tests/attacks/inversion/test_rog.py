from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn.functional import avg_pool2d, interpolate

from flpriv.attack import Attack
from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.inverting_gradients import InvertingGradients
from flpriv.attacks.inversion.latent_prior import LatentPrior
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import assemble
from flpriv.attacks.inversion.restoration import Restoration
from flpriv.attacks.inversion.rog import ROG, coarse
from flpriv.attacks.inversion.tuned_matching import TunedMatching
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError, ThreatError
from flpriv.measures.images import all_correlations
from flpriv.recipe import LocalRecipe
from flpriv.testing import check_attack, glass
from flpriv.threat import Can

Make = Callable[..., Any]
CPU = torch.device("cpu")
LABELS = torch.zeros(1, dtype=torch.long)
SHORT: dict[str, Any] = {"simulated": 2, "training": 3, "exact": False}


def test_it_keeps_its_contract() -> None:
    on = glass(Goal.RECONSTRUCTION, model="cnn")
    check_attack(ROG(iterations=30, lr=0.1, scale=2, simulated=3, training=5, exact=False), on=on)


def test_latents_are_enlarged_bicubically_and_volumes_trilinearly() -> None:
    latents = torch.rand(2, 3, 5, 7)
    found = coarse((20, 28), scale=4, device=CPU).decode(latents, LABELS)[0]
    assert torch.allclose(found, interpolate(latents, size=(20, 28), mode="bicubic"), atol=1e-5)
    latents = torch.rand(2, 1, 3, 4, 5)
    found = coarse((6, 8, 10), scale=2, device=CPU).decode(latents, LABELS)[0]
    assert torch.allclose(found, interpolate(latents, size=(6, 8, 10), mode="trilinear"), atol=1e-5)


@pytest.mark.parametrize("shape", [(1, 17, 30), (2, 5, 6, 7)])
@pytest.mark.parametrize("scale", [1, 3, 4])
def test_any_size_goes_there_and_back(shape: tuple[int, ...], scale: int) -> None:
    space = coarse(shape[1:], scale=scale, device=CPU)
    images = torch.rand(3, *shape)
    latents = space.encode(images, LABELS)
    assert latents.shape == (3, shape[0], *(-(-side // scale) for side in shape[1:]))
    back = space.decode(latents, LABELS)[0]
    assert back.shape == images.shape
    if scale == 1:
        assert torch.allclose(back, images, atol=1e-6)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8, 8)])
def test_one_computation_for_all_trials_comes_to_the_same(federate: Make, smooth: Make, shape: tuple[int, ...]) -> None:
    done = federate(smooth(1, shape))
    found = gather(
        done.capture,
        done.capture.observations[0],
        rng=torch.Generator().manual_seed(0),
        device=CPU,
        max_steps=1,
        max_images=1,
        who="t",
    )
    plan = Plan(space=coarse(shape[1:], scale=4, device=CPU))
    loop = assemble([found], found.labels.expand(3, 1), plan)
    trials = torch.stack([plan.space.encode(torch.rand(1, *shape), LABELS) for _ in range(3)])
    one, all = (problems(trials, torch.arange(3)) for problems in (loop, replace(loop, batched=True)))
    assert torch.allclose(one[0], all[0], atol=1e-5) and torch.allclose(one[1], all[1], atol=1e-5)
    assert float(one[1].abs().max()) > 0


@pytest.mark.parametrize(
    "defense",
    [("qsgd", {"levels": 16}), ("top-k", {"keep": 0.05}), ("sign-sgd", {}), ("uniform-quantiser", {"bits": 4})],
    ids=lambda defense: defense[0],
)
def test_obfuscated_updates_still_tell_the_image(
    federate: Make, obfuscated: Make, smooth: Make, psnr: Make, defense: tuple[str, dict[str, Any]]
) -> None:
    done = federate(smooth(1, (1, 24, 24), seed=3), public=smooth(8, (1, 24, 24), seed=8))
    (claim,) = ROG(scale=3, restore=False, exact=False)(obfuscated(done.capture, defense))
    assert isinstance(claim, Reconstruction)
    grey = torch.full_like(claim.images, float(done.used.images.mean()))
    assert psnr(claim.images, done.used.images).item() > psnr(grey, done.used.images).item() + 5


def test_restoration_adds_to_what_was_found(federate: Make, obfuscated: Make, xrays: Any, psnr: Make) -> None:
    small = replace(xrays.public, images=torch.nn.functional.avg_pool2d(xrays.public.images, 2))
    patient = replace(xrays.private, images=torch.nn.functional.avg_pool2d(xrays.private.images, 2)).take([0])
    done = federate(patient, public=small)
    capture = obfuscated(done.capture, ("qsgd", {"levels": 16}))
    plain, restored = (
        ROG(restore=restore, iterations=60, simulated=12, training=100, exact=False)(capture)[0] for restore in (False, True)
    )
    assert isinstance(plain, Reconstruction) and isinstance(restored, Reconstruction)
    assert psnr(restored.images, done.used.images).item() > psnr(plain.images, done.used.images).item() + 0.5


def test_volumes_and_batches_are_restored(federate: Make, smooth: Make) -> None:
    public = smooth(4, (1, 10, 12, 9), seed=8)
    done = federate(smooth(1, (1, 10, 12, 9)), public=public)
    (claim,) = ROG(iterations=2, **SHORT)(done.capture)
    assert isinstance(claim, Reconstruction) and claim.images.shape == (1, 1, 10, 12, 9)


def test_every_update_of_a_round_shares_one_network(federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = federate(smooth(1), public=smooth(4, seed=8)).capture
    (seen,) = capture.observations
    both = replace(capture, observations=(seen, replace(seen, node=8)))
    learned: list[int] = []
    learn = Restoration.learn

    def counted(self: Restoration, *args: Any, **options: Any) -> Any:
        learned.append(1)
        return learn(self, *args, **options)

    monkeypatch.setattr(Restoration, "learn", counted)
    attack = ROG(iterations=2, **SHORT)
    assert len(attack(both)) == 2 and len(learned) == 1
    assert len(attack(capture, seed=5)) == 1 and len(learned) == 1


def test_it_asks_for_public_images(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1)).capture
    with pytest.raises(FlprivError, match="grant 'know-public'"):
        ROG(iterations=1, exact=False)(capture)
    with pytest.raises(ThreatError, match="know-public"):
        ROG(iterations=1, exact=False)(replace(capture, granted=capture.granted & ~Can.KNOW_PUBLIC))


STEP = LocalRecipe(lr=0.05, batch_size=1, steps=1, train_mode=False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defense", "recipe", "least", "gain"),
    [
        (("qsgd", {"levels": 16}), STEP, 36, 0.1),
        (("top-k", {"keep": 0.05}), STEP, 50, 10),
        (("sign-sgd", {}), STEP, 29, 10),
        (("gaussian", {"max_grad_norm": 1.0, "noise_multiplier": 0.004}), STEP, 23.5, 2),
        (None, LocalRecipe(lr=0.003, batch_size=1, steps=5, train_mode=False), 58, 10),
    ],
    ids=["qsgd", "top-k", "sign-sgd", "gaussian", "five steps"],
)
def test_real_xrays_come_back_better_than_by_inverting_gradients(
    federate: Make,
    obfuscated: Make,
    xrays: Any,
    psnr: Make,
    defense: tuple[str, dict[str, Any]] | None,
    recipe: LocalRecipe,
    least: float,
    gain: float,
) -> None:
    """32×32 pixels; the plain attack is not told of the defence, has as many iterations and the better of two weights."""
    public, private = (replace(side, images=avg_pool2d(side.images, 2)) for side in (xrays.public, xrays.private))
    each = recipe.steps or 1
    seen, images = [], []
    for site in range(4 if each == 1 else 2):
        labels = (torch.arange(each) + site) % 10
        records = replace(private.take(range(site * each, (site + 1) * each)), labels=labels)
        done = federate(records, recipe=recipe, classes=10, grant=("know-labels", "know-order"), public=public)
        sent = obfuscated(done.capture, *([defense] if defense else []), seed=site)
        seen.append(replace(sent.observations[0], node=site))
        images.append(done.used.images)
    capture, used = replace(done.capture, observations=tuple(seen)), torch.cat(images)
    unaware = replace(capture, observations=tuple(replace(one, defenses=()) for one in seen))

    def quality(attack: Attack, view: Any) -> tuple[float, float]:
        """Mean PSNR, and the share of images that are nearer to their original than to any other patient's."""
        claims = attack(view)
        found = torch.cat([claim.images for claim in claims if isinstance(claim, Reconstruction)])
        nearest, own = (all_correlations(some, private.images).argmax(1) for some in (found, used))
        return float(psnr(found, used).mean()), float((nearest == own).double().mean())

    plain = [quality(InvertingGradients(iterations=140, exact=False, tv=tv), unaware) for tv in (0.2, 0.01)]
    noisy = LatentPrior(coarse=40, iterations=100, exact=False, rehearsed=2, simulated=8, training=200)
    ours = quality(noisy if defense else TunedMatching(iterations=140, exact=False, plan_name="lbfgs"), capture)
    assert ours[0] >= max(least, gain + max(one[0] for one in plain)), (ours, plain)
    assert ours[1] >= max(one[1] for one in plain) and ours[1] == 1, (ours, plain)
