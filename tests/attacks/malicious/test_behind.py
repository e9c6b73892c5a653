from __future__ import annotations

import pytest

from flpriv.attacks.malicious import behind
from flpriv.capture import Observation
from flpriv.recipe import LocalRecipe


def seen(node: int | None, examples: int | None, local: LocalRecipe | None, nodes: tuple[int, ...] = (1, 2, 3)) -> Observation:
    return Observation(round=1, node=node, sent={}, returned={}, examples=examples, local=local, nodes=nodes)


@pytest.mark.parametrize(
    ("observation", "images"),
    [
        (seen(1, 100, LocalRecipe(batch_size=8, steps=2)), 16),
        (seen(1, 10, LocalRecipe(batch_size=8, steps=2)), 10),
        (seen(1, 100, LocalRecipe(batch_size=8, epochs=2)), 100),
        (seen(1, None, None), None),
        (seen(None, 300, LocalRecipe(batch_size=8, steps=2)), 48),
        (seen(None, 300, None), 300),
        (seen(None, None, LocalRecipe(batch_size=8, steps=1)), 24),
    ],
)
def test_no_more_images_than_were_used(observation: Observation, images: int | None) -> None:
    assert behind.images(observation) == images


def test_what_weight_decay_leaves() -> None:
    recipe = LocalRecipe(lr=0.1, weight_decay=0.5, batch_size=10, epochs=2)
    assert behind.kept(seen(1, 30, recipe)) == pytest.approx(0.95**6)
    assert behind.kept(seen(None, 90, recipe)) == pytest.approx(0.95**6)
    assert behind.kept(seen(1, None, recipe)) == 1
    assert behind.kept(seen(1, 30, None)) == 1
    assert behind.kept(seen(1, 30, LocalRecipe(optimizer="adam", weight_decay=0.5))) == 1
