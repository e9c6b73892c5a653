from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion import simulation
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.rehearsal import best
from flpriv.attacks.inversion.search import Adam
from flpriv.attacks.inversion.simulation import Pairs, simulate
from flpriv.attacks.inversion.stages import carry_out
from flpriv.capture import Capture
from flpriv.errors import FlprivError
from flpriv.measures.images import mse, psnr
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
BATCH = LocalRecipe(lr=0.05, batch_size=2, steps=1, train_mode=False)


def evidence(capture: Capture) -> Evidence:
    rng, device = torch.Generator().manual_seed(0), torch.device("cpu")
    return gather(capture, capture.observations[0], rng=rng, device=device, max_steps=16, max_images=64, who="test")


def pairs(capture: Capture, *, iterations: int = 150, updates: int = 3, seed: int = 0) -> Pairs:
    rng = torch.Generator().manual_seed(seed)
    plan = Plan(optimiser=Adam(), iterations=iterations, regularisers=((0.003, total_variation),))
    return simulate(plan, evidence(capture), capture, updates=updates, rng=rng, what="test")


def protected(capture: Capture, *defenses: tuple[str, dict[str, Any]]) -> Capture:
    (seen,) = capture.observations
    return replace(capture, observations=(replace(seen, defenses=defenses),))


def among(images: Tensor, known: Tensor) -> bool:
    return all(any(torch.equal(image, one) for one in known) for image in images)


@pytest.mark.parametrize("recipe", [replace(BATCH, batch_size=1), BATCH], ids=["one image", "two images"])
def test_public_images_come_back_from_updates_of_their_own(federate: Make, smooth: Make, recipe: LocalRecipe) -> None:
    public = smooth(6, seed=8)
    capture = federate(smooth(recipe.batch_size), recipe=recipe, public=public).capture
    done = pairs(capture)
    assert done.found.shape == done.images.shape == (3 * recipe.batch_size, 1, 16, 16)
    assert len(done.mismatch) == 3 and float(done.mismatch.max()) < 0.1
    assert among(done.images, public.images) and len(torch.unique(done.images, dim=0)) == len(done.images)
    assert float(psnr(mse(done.found, done.images)).mean()) > 20


def test_images_are_drawn_again_where_there_are_too_few(federate: Make, smooth: Make) -> None:
    done = pairs(federate(smooth(1), public=smooth(2, seed=8)).capture, iterations=1, updates=5)
    assert len(done.found) == 5


def test_it_depends_on_its_generator_alone(federate: Make, smooth: Make) -> None:
    capture = federate(smooth(1), public=smooth(6, seed=8)).capture
    one, again, other = (pairs(capture, iterations=2, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.found, again.found) and torch.equal(one.images, again.images)
    assert not torch.equal(one.found, other.found)


def test_updates_pass_the_defences_and_the_real_one_is_not_looked_at(
    federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = smooth(6, seed=8)
    capture = protected(federate(smooth(1), public=public).capture, ("top-k", {"keep": 0.1}), ("sign-sgd", {}))
    attacked: list[Evidence] = []

    def watched(plan: Plan, group: list[Evidence], *args: Any, **options: Any) -> Any:
        attacked.extend(group)
        return carry_out(plan, group, *args, **options)

    monkeypatch.setattr(simulation, "carry_out", watched)
    pairs(capture, iterations=1)
    (real,) = capture.observations
    assert len(attacked) == 3
    for one in attacked:
        assert one.seen.labels is None
        for (name, value), target in zip(one.seen.update.items(), one.target, strict=True):
            kept = value[value != 0]
            assert len(kept) <= 0.1 * value.numel() + 1
            assert torch.allclose(kept.abs(), kept.abs().mean(), rtol=1e-2)
            assert torch.allclose(value / -one.site.recipe.lr, target, atol=1e-4)
            assert not torch.equal(value, real.update[name])


def test_without_public_images_it_says_so(federate: Make, smooth: Make) -> None:
    with pytest.raises(FlprivError, match="test: learns from public images"):
        pairs(federate(smooth(1)).capture)


def test_a_rehearsal_chooses_what_brings_public_images_back(
    federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under noise, much smoothing; without, little: though the objective is always lower with little."""
    capture = federate(smooth(1), public=smooth(6, seed=8)).capture
    plans = {
        f"{tv}": Plan(optimiser=Adam(schedule="cosine"), iterations=60, regularisers=((tv, total_variation),))
        for tv in (0.001, 0.3)
    }
    noisy = protected(capture, ("gaussian", {"noise_multiplier": 0.01, "max_grad_norm": 1.0}))
    assert best(plans, evidence(capture), capture, updates=2, key={}) == "0.001"
    assert best(plans, evidence(noisy), noisy, updates=2, key={}) == "0.3"
    monkeypatch.setattr("flpriv.attacks.inversion.rehearsal.simulate", None)
    assert best(plans, evidence(noisy), noisy, updates=2, key={}) == "0.3", "kept"
    assert best({"only": plans["0.3"]}, evidence(capture), capture, updates=2, key={}) == "only"


def test_several_images_have_the_labels_of_the_sites_while_there_are_such(federate: Make, smooth: Make) -> None:
    public = replace(smooth(8, seed=8), labels=torch.tensor([0, 1, 0, 1, 1, 1, 1, 1]))
    for own in ([0, 1], [0, 0], [1, 1]):
        records = replace(smooth(2), labels=torch.tensor(own))
        done = pairs(federate(records, recipe=BATCH, public=public, grant=("know-labels",)).capture, iterations=1, updates=2)
        labels = [next(int(public.labels[i]) for i in range(8) if torch.equal(public.images[i], one)) for one in done.images]
        assert among(done.images, public.images) and len(torch.unique(done.images, dim=0)) == 4
        assert sorted(labels[:2]) == own
        assert sorted(labels) == ([0, 0, 1, 1] if own == [0, 0] else sorted(2 * own)), "two have label 0, and no more"
