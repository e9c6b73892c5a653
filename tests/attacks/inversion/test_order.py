from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.order import Order, in_any_order, in_order, same_course
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.problems import assemble
from flpriv.attacks.inversion.unroll import Replay, batches
from flpriv.capture import Capture
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
CPU = torch.device("cpu")


def steps(recipe: LocalRecipe, examples: int) -> Replay:
    """A site whose model does not matter."""
    return Replay(model=torch.nn.Identity(), start={}, rest={}, recipe=recipe, batches=batches(recipe, examples=examples))


def evidence(capture: Capture) -> Evidence:
    rng = torch.Generator().manual_seed(0)
    return gather(capture, capture.observations[0], rng=rng, device=CPU, max_steps=99, max_images=99, who="test")


def tells(order: Order) -> tuple[list[int], list[list[int]]]:
    return order.labels.tolist(), order.course.tolist()


def test_labels_in_order_tell_which_images_are_used_again() -> None:
    site = steps(LocalRecipe(batch_size=1, epochs=2), 3)
    assert tells(in_order(torch.tensor([4, 2, 7, 7, 4, 2]), site)) == ([4, 2, 7], [[0, 1, 2], [2, 0, 1]])
    # Images of one label take turns; labels that cannot be fill up the places.
    assert tells(in_order(torch.tensor([1, 0, 1, 1, 1, 0]), site)) == ([1, 0, 1], [[0, 1, 2], [0, 2, 1]])
    assert tells(in_order(torch.tensor([1, 0, 1, 0, 0, 1]), site)) == ([1, 0, 1], [[0, 1, 2], [1, 2, 0]])
    broken_off = steps(LocalRecipe(batch_size=1, steps=4), 3)
    assert tells(in_order(torch.tensor([4, 2, 7, 7]), broken_off)) == ([4, 2, 7], [[0, 1, 2], [2, 0, 1]])


@pytest.mark.parametrize(
    ("uses", "recipe", "examples", "labels"),
    [
        ([0, 1, 1, 2], LocalRecipe(batch_size=1, epochs=1), 4, [0, 1, 1, 2]),
        ([0, 0, 1, 1, 1, 1], LocalRecipe(batch_size=2, epochs=2), 3, [0, 1, 1]),
        ([0, 0, 1, 2], LocalRecipe(batch_size=1, steps=4), 3, [0, 1, 2]),
        ([1, 1, 1, 3], LocalRecipe(batch_size=1, steps=4), 3, [1, 1, 3]),
    ],
)
def test_labels_in_any_order_tell_those_of_the_images(
    uses: list[int], recipe: LocalRecipe, examples: int, labels: list[int]
) -> None:
    site = steps(recipe, examples)
    assert tells(in_any_order(torch.tensor(uses), site)) == (labels, same_course(site).tolist())


def test_orders_drawn_are_those_that_may_be() -> None:
    rng = torch.Generator().manual_seed(0)
    one = steps(LocalRecipe(batch_size=1, steps=4), 4)
    known = in_any_order(torch.tensor([0, 1, 1, 2]), one)

    def drawn(site: Replay, order: Order, *, ordered: bool) -> set[object]:
        return {order.drawn(site, ordered=ordered, rng=rng).steps(site) for _ in range(300)}

    assert len(drawn(one, known, ordered=False)) == 12
    assert drawn(one, known, ordered=True) == {known.steps(one)}
    pairs = steps(LocalRecipe(batch_size=2, steps=2), 4)
    assert len(drawn(pairs, in_any_order(torch.arange(4), pairs), ordered=False)) == 6
    twice = steps(LocalRecipe(batch_size=1, epochs=2), 4)
    told = in_order(torch.tensor([0, 1, 1, 2, 2, 1, 0, 1]), twice)
    assert len(drawn(twice, told, ordered=True)) == 2
    assert all(told.drawn(twice, ordered=True, rng=rng).labels.tolist() == [0, 1, 1, 2] for _ in range(9))


def test_neighbours_exchange_two_images_of_different_steps() -> None:
    one = steps(LocalRecipe(batch_size=1, steps=4), 4)
    order = in_any_order(torch.tensor([0, 1, 1, 2]), one)
    near = [next_to.labels.tolist() for next_to in order.neighbours(one, ordered=False)]
    assert sorted(near) == [[0, 1, 2, 1], [0, 2, 1, 1], [1, 0, 1, 2], [1, 1, 0, 2], [2, 1, 1, 0]]
    assert not list(order.neighbours(one, ordered=True))
    pairs = steps(LocalRecipe(batch_size=2, epochs=2), 4)
    first = Order(labels=torch.tensor([0, 1, 2, 2]), course=torch.tensor([[0, 1, 2, 3], [3, 2, 1, 0]]))
    near_pairs = {order.steps(pairs) for order in first.neighbours(pairs, ordered=False)}
    assert len(near_pairs) == 8 and first.steps(pairs) not in near_pairs
    # An exchange in the first epoch leaves each image where it is used again.
    other = first._exchanged(0, 0, 2)
    assert tells(other) == ([2, 1, 0, 2], [[0, 1, 2, 3], [3, 0, 1, 2]])


def test_the_order_known_replays_epochs_that_are_shuffled(federate: Make, smooth: Make) -> None:
    recipe = LocalRecipe(lr=0.1, batch_size=1, epochs=3, train_mode=False)
    done = federate(smooth(4, labels=4), recipe=recipe, classes=4, grant=("know-labels", "know-order"))
    found = evidence(done.capture)
    assert found.ordered and len({tuple(row) for row in found.order.course.tolist()}) > 1
    images, order = done.used.images, found.order
    assert order.labels.tolist() == done.used.labels.tolist()
    assert relative(found.site(images, order.labels, order.course), found.target) < 1e-6
    assert relative(found.site(images, order.labels), found.target) > 1e-4


def test_each_problem_follows_its_own_order(federate: Make, smooth: Make) -> None:
    """One computation for all, as on a GPU, gives what one after another gives."""
    recipe = LocalRecipe(lr=0.1, batch_size=2, epochs=2, train_mode=False)
    done = federate(smooth(4, labels=4), recipe=recipe, classes=4, grant=("know-labels",))
    found = evidence(done.capture)
    assert not found.ordered
    rng = torch.Generator().manual_seed(1)
    orders = [found.order.drawn(found.site, ordered=False, rng=rng) for _ in range(3)]
    labels, courses = torch.stack([o.labels for o in orders]), torch.stack([o.course for o in orders])
    images, rows = done.used.images.expand(3, -1, -1, -1, -1), torch.arange(3)
    loop = assemble([found], labels, Plan(objective=relative), courses=courses)
    assert not loop.batched
    values, slopes = loop(images, rows)
    for row, order in enumerate(orders):
        moved = found.site(done.used.images, order.labels, order.course)
        assert torch.allclose(values[row], relative(moved, found.target), rtol=1e-4)
    both = replace(loop, batched=True)(images, rows)
    assert torch.allclose(values, both[0], rtol=1e-3) and torch.allclose(slopes, both[1], atol=1e-4)
