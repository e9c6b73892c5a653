from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.inverting_gradients import InvertingGradients
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ThreatError
from flpriv.recipe import LocalRecipe
from flpriv.registry import create
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]

SHORT = {"iterations": 200}
KNOWN = ("know-labels", "know-order")


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """A claim with everything this attack tells."""

    images: Tensor
    labels: list[int]
    objective: float
    round: int
    node: int | None


def invert(capture: Capture, *, seed: int = 0, **options: Any) -> list[Inverted]:
    done = []
    for claim in InvertingGradients(**{"exact": False, **options})(capture, seed=seed):
        assert isinstance(claim, Reconstruction) and claim.labels is not None and claim.objective is not None
        objective = claim.objective.item()
        done.append(
            Inverted(images=claim.images, labels=claim.labels.tolist(), objective=objective, round=claim.round, node=claim.node)
        )
    return done


@pytest.mark.parametrize("grant", [(), ("know-labels",)], ids=["labels recovered", "labels known"])
@pytest.mark.parametrize(("model", "least"), [("cnn", 30), ("lenet", 20)])
def test_one_image_comes_back(federate: Make, smooth: Make, psnr: Make, grant: tuple[str, ...], model: str, least: float) -> None:
    done = federate(smooth(1, (1, 24, 24), seed=3), model=model, grant=grant, mean=0.4, std=0.2)
    (claim,) = invert(done.capture, **SHORT)
    assert psnr(claim.images, done.used.images).item() >= least
    assert claim.labels == done.used.labels.tolist()
    assert (claim.round, claim.node) == (1, 7)
    blind = invert(blindfold(done.capture), **SHORT)[0]
    assert psnr(blind.images, done.used.images).item() < psnr(claim.images, done.used.images).item() - 8
    assert blind.objective > 10 * claim.objective


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.02, batch_size=4, steps=1, train_mode=False),
        LocalRecipe(lr=0.02, batch_size=1, steps=4, train_mode=False),
        LocalRecipe(lr=0.02, batch_size=2, steps=2, momentum=0.5, weight_decay=0.01, train_mode=False),
        LocalRecipe(lr=0.02, batch_size=4, epochs=2, train_mode=False),
    ],
    ids=["a batch", "four steps", "momentum and decay", "two epochs"],
)
def test_batches_and_steps_come_back(federate: Make, smooth: Make, psnr: Make, recipe: LocalRecipe) -> None:
    done = federate(smooth(4, (1, 24, 24), labels=4, seed=3), recipe=recipe, classes=4, grant=KNOWN)
    (claim,) = invert(done.capture, iterations=200, tv=0.003)
    assert psnr(claim.images, done.used.images).mean() >= 28
    guess = torch.full_like(claim.images, 0.5)
    assert psnr(claim.images, done.used.images).mean() > psnr(guess, done.used.images).mean() + 10


def test_batch_statistics_are_replayed(federate: Make, smooth: Make) -> None:
    """In train mode the true images match through batch norm: a far better objective than any other mode would reach."""
    recipe = LocalRecipe(lr=0.05, batch_size=4, steps=1)
    done = federate(smooth(4, (1, 16, 16)), recipe=recipe, model="resnet18", grant=KNOWN)
    (claim,) = invert(done.capture, iterations=3)
    assert claim.images.shape == (4, 1, 16, 16)
    assert claim.objective < 1


def test_volumes_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(1, (1, 10, 12, 14), seed=2), grant=KNOWN)
    (claim,) = invert(done.capture, **SHORT)
    assert claim.images.shape == (1, 1, 10, 12, 14)
    assert psnr(claim.images, done.used.images).item() >= 25


def test_an_unknown_order_may_be_drawn(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=1, steps=3, train_mode=False)
    done = federate(smooth(3, labels=3), recipe=recipe, classes=3, grant=("know-labels",))
    orders = {tuple(invert(done.capture, seed=seed, iterations=2, orders=1)[0].labels) for seed in range(12)}
    assert len(orders) > 2 and all(sorted(order) == [0, 1, 2] for order in orders)


def test_restarts_keep_the_lowest_objective(federate: Make, smooth: Make) -> None:
    done = federate(smooth(1))
    one = invert(done.capture, seed=4, iterations=30)[0]
    best = invert(done.capture, seed=4, iterations=30, restarts=4)[0]
    assert best.objective < one.objective


def test_equal_seeds_equal_claims_and_the_capture_stays(federate: Make, smooth: Make) -> None:
    done = federate(smooth(2), recipe=LocalRecipe(lr=0.05, batch_size=2, steps=1), public=smooth(4, seed=8))
    seen = done.capture.observations[0]
    before = {key: value.clone() for key, value in (*seen.sent.items(), *seen.returned.items())}
    one, again, other = (invert(done.capture, seed=seed, iterations=20)[0] for seed in (1, 1, 2))
    assert torch.equal(one.images, again.images) and not torch.equal(one.images, other.images)
    assert all(torch.equal({**seen.sent, **seen.returned}[key], value) for key, value in before.items())


def test_layers_that_came_back_unchanged_are_left_out(federate: Make, smooth: Make, psnr: Make) -> None:
    done = federate(smooth(1, (1, 24, 24), seed=3))
    seen = done.capture.observations[0]
    held = {key: seen.sent[key] if key.startswith("conv2") else value for key, value in seen.returned.items()}
    (claim,) = invert(replace(done.capture, observations=(replace(seen, returned=held),)), **SHORT)
    assert psnr(claim.images, done.used.images).item() >= 28


def test_an_update_of_nothing_gives_a_claim_all_the_same(federate: Make, smooth: Make) -> None:
    done = federate(smooth(1))
    seen = done.capture.observations[0]
    (claim,) = invert(replace(done.capture, observations=(replace(seen, returned=seen.sent),)), iterations=5)
    assert bool(torch.isfinite(claim.images).all())
    assert claim.objective >= 1


def several(capture: Capture) -> Capture:
    (seen,) = capture.observations
    seen = replace(seen, labels=None)
    places = ((1, 7), (1, 8), (2, 7), (2, None))
    return replace(capture, observations=tuple(replace(seen, round=round, node=node) for round, node in places))


def test_rounds_and_limit_choose_the_updates(federate: Make, smooth: Make) -> None:
    capture = several(federate(smooth(1)).capture)

    def attacked(**options: Any) -> list[tuple[int, int]]:
        return [
            (claim.round, claim.node) for claim in create("attacks", "inverting-gradients", {"iterations": 1, **options})(capture)
        ]

    assert attacked() == [(1, 7), (1, 8)]
    assert attacked(rounds=[2]) == [(2, 7)]
    assert attacked(rounds=[], limit=2) == [(1, 7), (1, 8)]
    with pytest.raises(FlprivError, match=r"no honest update was captured in rounds 3; set the option rounds"):
        attacked(rounds=[3])


def test_what_it_cannot_do_is_said(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=4)
    done = federate(smooth(4), recipe=recipe, grant=KNOWN)
    capture, seen = done.capture, done.capture.observations[0]
    with pytest.raises(FlprivError, match=r"round 1, node 7: 4 local steps on 4 images.*max_steps = 3"):
        invert(capture, max_steps=3)
    with pytest.raises(FlprivError, match=r"max_images = 2"):
        invert(capture, max_images=2)
    with pytest.raises(FlprivError, match="3 labels for 4 uses"):
        invert(replace(capture, observations=(replace(seen, labels=torch.tensor([0, 1, 0])),)))
    with pytest.raises(FlprivError, match="no honest update"):
        invert(replace(capture, observations=(replace(seen, trap="imprint"),)))


@pytest.mark.parametrize("can", [Can.SEE_UPDATES, Can.KNOW_LOCAL])
def test_it_needs_updates_and_the_recipe(federate: Make, smooth: Make, can: Can) -> None:
    capture = federate(smooth(1)).capture
    with pytest.raises(ThreatError):
        invert(replace(capture, granted=capture.granted & ~can), **SHORT)


def test_a_real_xray_comes_back_in_a_third_of_the_iterations(federate: Make, xrays: Any, psnr: Make) -> None:
    done = federate(xrays.private.take([0]), mean=0.5, std=0.25)
    (claim,) = invert(done.capture, iterations=300)
    assert psnr(claim.images, done.used.images).item() >= 30


@pytest.mark.slow
def test_real_xrays_come_back_at_30_db_on_average(federate: Make, xrays: Any, psnr: Make) -> None:
    """64×64 pixels, the small CNN at its initial weights, labels read from the update."""
    found = []
    for place in range(8):
        done = federate(xrays.private.take([place]), seed=place)
        found.append(psnr(invert(done.capture, seed=place)[0].images, done.used.images))
    assert torch.cat(found).mean() >= 30


@pytest.mark.slow
@pytest.mark.parametrize(("lr", "least"), [(0.01, 30), (0.1, 15)])
def test_four_steps_on_real_xrays(federate: Make, xrays: Any, psnr: Make, lr: float, least: float) -> None:
    """32×32 pixels, one image of each of four classes a step, labels and their order granted; the mean of three updates."""
    found = []
    for update in range(3):
        records = xrays.private.take(range(4 * update, 4 * update + 4))
        small = replace(records, images=torch.nn.functional.avg_pool2d(records.images, 2), labels=torch.arange(4))
        recipe = LocalRecipe(lr=lr, batch_size=1, steps=4, train_mode=False)
        done = federate(small, recipe=recipe, classes=4, grant=KNOWN, seed=update)
        found.append(psnr(invert(done.capture, seed=update)[0].images, done.used.images))
    assert torch.cat(found).mean() >= least, found
