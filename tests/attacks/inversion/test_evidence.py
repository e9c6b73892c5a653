"""What is known of a round agrees with the site's real training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.inverting_gradients import InvertingGradients
from flpriv.attacks.inversion.matching import _alike
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.tuned_matching import TunedMatching
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
KNOWN = ("know-labels", "know-order")


def evidence(capture: Capture) -> Evidence:
    rng, cpu = torch.Generator().manual_seed(0), torch.device("cpu")
    return gather(capture, capture.observations[0], rng=rng, device=cpu, max_steps=99, max_images=99, who="test")


def apart(found: Evidence, images: torch.Tensor) -> float:
    """Relative squared distance of the replay of true images from the update."""
    return float(relative(found.site(images, found.order.labels, found.order.course), found.target))


@pytest.mark.parametrize("steps", [1, 3])
def test_class_weights_of_a_balanced_loss_follow_from_all_labels(federate: Make, smooth: Make, steps: int) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=6 // steps, steps=steps, loss="balanced-cross-entropy", train_mode=False)
    records = replace(smooth(6, labels=3), labels=torch.tensor([0, 0, 0, 0, 2, 1]))
    done = federate(records, recipe=recipe, classes=4, grant=KNOWN)
    found = evidence(done.capture)
    assert found.site.class_weights is not None
    assert torch.allclose(found.site.class_weights, torch.tensor([0.5, 2.0, 2.0, 0.0]))
    assert apart(found, done.used.images) < 1e-6
    equal = replace(found, site=replace(found.site, class_weights=None))
    assert apart(equal, done.used.images) > 1e-2


def test_class_weights_are_not_guessed_from_a_part_of_the_records(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=2, steps=1, loss="balanced-cross-entropy", train_mode=False)
    done = federate(smooth(6, labels=3), recipe=recipe, classes=3, grant=KNOWN)
    assert evidence(done.capture).site.class_weights is None


def test_updates_of_other_class_weights_are_searched_apart(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=3, steps=1, loss="balanced-cross-entropy", train_mode=False)
    captures = [
        federate(replace(smooth(3), labels=torch.tensor(labels)), recipe=recipe, grant=KNOWN).capture
        for labels in ([0, 0, 1], [0, 1, 0], [0, 1, 1])
    ]
    one, same, other = (_alike(evidence(capture)) for capture in captures)
    assert one == same and one != other


def test_a_round_under_a_balanced_loss_comes_back(federate: Make, smooth: Make, psnr: Make) -> None:
    recipe = LocalRecipe(lr=0.01, batch_size=1, steps=3, loss="balanced-cross-entropy", train_mode=False)
    records = replace(smooth(3), labels=torch.tensor([0, 0, 1]))
    done = federate(records, recipe=recipe, grant=KNOWN)
    (claim,) = TunedMatching(plan_name="lbfgs", iterations=120, exact=False)(done.capture)
    assert isinstance(claim, Reconstruction)
    # Images of one label add up to nearly the same update in any mixture; the one alone in its class stands by itself.
    assert done.used.labels.tolist().count(1) == 1
    assert float(psnr(claim.images, done.used.images)[done.used.labels == 1]) >= 24


@pytest.mark.parametrize(
    "recipe",
    [LocalRecipe(lr=0.02, batch_size=2, steps=1), LocalRecipe(lr=0.02, batch_size=2, epochs=2)],
    ids=["one step", "two epochs"],
)
def test_batch_statistics_are_those_of_the_site(
    federate: Make, smooth: Make, psnr: Make, shallow: str, recipe: LocalRecipe
) -> None:
    """A model with batch normalisation in train mode."""
    done = federate(smooth(2), recipe=recipe, model=shallow, grant=KNOWN)
    assert apart(evidence(done.capture), done.used.images) < 1e-5
    seen = done.capture.observations[0]
    other = replace(done.capture, observations=(replace(seen, local=replace(recipe, train_mode=False)),))
    assert apart(evidence(other), done.used.images) > 1e-2


def test_images_come_back_through_batch_statistics(federate: Make, smooth: Make, psnr: Make, shallow: str) -> None:
    done = federate(smooth(2), recipe=LocalRecipe(lr=0.02, batch_size=2, steps=1), model=shallow, grant=KNOWN)
    (claim,) = InvertingGradients(iterations=250, exact=False)(done.capture)
    assert isinstance(claim, Reconstruction)
    assert float(psnr(claim.images, done.used.images).mean()) >= 21


@pytest.mark.slow
def test_four_steps_with_momentum_come_back(federate: Make, smooth: Make, psnr: Make) -> None:
    recipe = LocalRecipe(lr=0.01, batch_size=1, steps=4, momentum=0.9, weight_decay=0.01, train_mode=False)
    done = federate(smooth(4, labels=4), recipe=recipe, classes=4, grant=KNOWN)
    assert apart(evidence(done.capture), done.used.images) < 1e-6
    (claim,) = TunedMatching(plan_name="homotopy tv=0.0001", iterations=250, exact=False)(done.capture)
    assert isinstance(claim, Reconstruction)
    assert float(psnr(claim.images, done.used.images).mean()) >= 25


def test_a_step_of_adam_gives_away_its_labels(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(optimizer="adam", lr=0.001, batch_size=4, steps=1, train_mode=False)
    four = federate(smooth(4, labels=4), recipe=recipe, classes=10, public=smooth(20, labels=10, seed=9))
    assert evidence(four.capture).labels.tolist() == [0, 1, 2, 3]


def test_a_step_of_adam_gives_away_its_image(federate: Make, xrays: Any, psnr: Make) -> None:
    """An X-ray of 32×32 pixels. Without blur no search gets beyond 15 dB."""
    recipe = LocalRecipe(optimizer="adam", lr=0.001, batch_size=1, steps=1, train_mode=False)
    whole = xrays.private.take([1])
    records = replace(whole, images=torch.nn.functional.avg_pool2d(whole.images, 2))
    done = federate(records, recipe=recipe, classes=10, mean=0.5, std=0.25, seed=1)
    assert evidence(done.capture).site.blur > 0
    (claim,) = TunedMatching(plan_name="lbfgs", iterations=150, exact=False)(done.capture)
    assert isinstance(claim, Reconstruction)
    assert float(psnr(claim.images, done.used.images).mean()) >= 24
