from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.order import Order
from flpriv.attacks.inversion.tournament import likeliest
from flpriv.capture import Capture
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]


def contest(capture: Capture, *, orders: int, wanted: int = 1, seed: int = 0) -> list[Order]:
    rng, cpu = torch.Generator().manual_seed(seed), torch.device("cpu")
    found = gather(capture, capture.observations[0], rng=rng, device=cpu, max_steps=99, max_images=99, who="test")
    shape = (found.site.images, *capture.task.shape)
    return likeliest(found, orders=orders, wanted=wanted, shape=shape, rng=rng, what="test", key={})


def test_the_true_order_wins(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=3, train_mode=False)
    done = federate(smooth(3, (1, 12, 12), labels=3), recipe=recipe, classes=3, grant=("know-labels",))
    best = contest(done.capture, orders=24, wanted=8)
    assert best[0].labels.tolist() == done.used.labels.tolist()
    assert len({tuple(order.labels.tolist()) for order in best[:6]}) == 6
    assert torch.equal(best[6].labels, best[0].labels)


@pytest.mark.slow
def test_beyond_what_can_be_tried_the_neighbours_of_the_best_lead_to_it(federate: Make, smooth: Make) -> None:
    """6 images in 6 steps have 720 orders."""
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=6, train_mode=False)
    done = federate(smooth(6, (1, 12, 12), labels=6), recipe=recipe, classes=6, grant=("know-labels",))
    (best,) = contest(done.capture, orders=48)
    places = [best.labels.tolist().index(label) for label in done.used.labels.tolist()]
    assert sum(place != at for at, place in enumerate(places)) <= 2


def test_one_order_is_drawn_and_a_known_one_is_kept(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.05, batch_size=1, steps=3, train_mode=False)
    free = federate(smooth(3, labels=3), recipe=recipe, classes=3, grant=("know-labels",)).capture
    assert len({tuple(order.labels.tolist()) for order in contest(free, orders=1, wanted=30)}) == 6
    known = federate(smooth(3, labels=3), recipe=recipe, classes=3, grant=("know-labels", "know-order"))
    assert all(order.labels.tolist() == known.used.labels.tolist() for order in contest(known.capture, orders=24, wanted=2))
