from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion import tuning
from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.search import Adam
from flpriv.attacks.inversion.simulation import Pairs, simulate
from flpriv.attacks.inversion.tuned_matching import TunedMatching, plans
from flpriv.attacks.inversion.tuning import shortened
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.registry import create
from flpriv.testing import blindfold

Make = Callable[..., Any]
QUICK: dict[str, Any] = {"iterations": 250, "rungs": (150,), "simulated": 1, "exact": False}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("FLPRIV_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def only(claims: Any) -> Reconstruction:
    (claim,) = claims
    assert isinstance(claim, Reconstruction) and claim.objective is not None
    return claim


@pytest.mark.parametrize("shape", [(1, 20, 20), (1, 8, 8, 8)], ids=["image", "volume"])
def test_a_batch_comes_back_sharp_and_blind_it_does_not(federate: Make, smooth: Make, psnr: Make, shape: tuple[int, ...]) -> None:
    step = LocalRecipe(lr=0.1, batch_size=3, steps=1, train_mode=False)
    done = federate(
        smooth(3, shape, labels=3),
        recipe=step,
        classes=3,
        grant=("know-labels", "know-order"),
        public=smooth(6, shape, labels=3, seed=9),
        mean=0.4,
        std=0.2,
    )
    claim = only(TunedMatching(**QUICK)(done.capture))
    assert float(psnr(claim.images, done.used.images).min()) >= 40
    assert claim.sensitivity is not None and claim.sensitivity > 0.01
    blind = only(TunedMatching(**QUICK)(blindfold(done.capture)))
    assert float(psnr(blind.images, done.used.images).mean()) < 25


def test_the_contest_is_held_once(federate: Make, smooth: Make, own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done = federate(smooth(1), grant=("know-labels",), public=smooth(4, seed=9))
    held: list[str] = []

    def watched(*given: Any, **named: Any) -> Pairs:
        held.append(named["what"])
        return simulate(*given, **named)

    monkeypatch.setattr(tuning, "simulate", watched)
    first = only(TunedMatching(**QUICK)(done.capture))
    entered = len(plans(smooth=True))
    assert len(held) == entered
    assert len(list((own_cache / "tuning").iterdir())) == 1
    again = only(TunedMatching(**QUICK)(done.capture))
    assert len(held) == entered
    assert torch.equal(first.images, again.images)
    capture = replace(done.capture, task=replace(done.capture.task, mean=0.3))
    only(TunedMatching(**QUICK)(capture))
    assert len(held) == 2 * (entered)


def test_the_winner_explains_public_updates_best(federate: Make, smooth: Make) -> None:
    """A search that cannot move loses, wherever it stands in the list."""
    done = federate(smooth(1), grant=("know-labels",), public=smooth(4, seed=9))
    rng = torch.Generator().manual_seed(0)
    (seen,) = done.capture.observations
    evidence = gather(done.capture, seen, rng=rng, device=torch.device("cpu"), max_steps=1, max_images=1, who="test")
    good = plans(smooth=False)["lbfgs"]
    bad = replace(good, optimiser=Adam(lr=1e-9))
    for order in ({"good": good, "bad": bad}, {"bad": bad, "good": good}):
        assert tuning.tune(order, evidence, done.capture, updates=2, rungs=(40,), rng=rng, what="test") == "good"


def test_without_public_images_there_is_no_contest(federate: Make, smooth: Make, own_cache: Path, psnr: Make) -> None:
    done = federate(smooth(1), grant=("know-labels",))
    claim = only(TunedMatching(iterations=100, exact=False)(done.capture))
    assert float(psnr(claim.images, done.used.images).min()) >= 40 and claim.sensitivity is None
    assert not own_cache.exists()


def test_a_search_can_be_named(federate: Make, smooth: Make) -> None:
    done = federate(smooth(1), grant=("know-labels",))
    named = create("attacks", "tuned-matching", {"plan_name": "adam tv=0.01", "iterations": 20})
    only(named(done.capture))
    with pytest.raises(FlprivError, match="did you mean"):
        TunedMatching(plan_name="adam tv=0.02", exact=False)(done.capture)


def test_iterations_are_shared_out_over_the_stages() -> None:
    whole = plans(smooth=True)["homotopy tv=0.001"]
    assert len(whole.stages) == 5
    assert sum(stage.iterations for stage in shortened(whole, 250).stages) == 250
    assert min(stage.iterations for stage in shortened(whole, 1).stages) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "least"), [(0.01, 42), (0.1, 22)])
@pytest.mark.parametrize("grant", [("know-labels", "know-order"), ("know-labels",)], ids=["order known", "order unknown"])
def test_four_steps_on_real_xrays(
    federate: Make, xrays: Any, psnr: Make, lr: float, least: float, grant: tuple[str, ...]
) -> None:
    """32×32 pixels, one image of each of four classes a step; the mean of four updates. An unknown order costs at most 3 dB."""
    recipe = LocalRecipe(lr=lr, batch_size=1, steps=4, train_mode=False)
    found = []
    for update in range(4):
        records = xrays.private.take(range(4 * update, 4 * update + 4))
        small = replace(records, images=torch.nn.functional.avg_pool2d(records.images, 2), labels=torch.arange(4))
        done = federate(small, recipe=recipe, classes=10, grant=grant, mean=0.5, std=0.25, seed=update)
        claim = only(TunedMatching(plan_name="homotopy tv=0.0001", exact=False)(done.capture, seed=update))
        found.append(psnr(claim.images, done.used.images))
    assert torch.cat(found).mean() >= least - (0 if "know-order" in grant else 3), found
