"""How many images, and how many local steps, are behind what was observed."""

from __future__ import annotations

from flpriv.attacks.inversion.unroll import batches
from flpriv.capture import Observation


def images(seen: Observation) -> int | None:
    """At most so many distinct images; ``None`` where neither the examples nor the recipe tell."""
    nodes = 1 if seen.node is not None else max(1, len(seen.nodes))
    taken = nodes * seen.local.batch_size * seen.local.steps if seen.local is not None and seen.local.steps else None
    return min((count for count in (seen.examples, taken) if count), default=None)


def kept(seen: Observation) -> float:
    """The share of a weight that SGD's weight decay left after all local steps of a node, 1 where the recipe is not known."""
    recipe = seen.local
    if recipe is None or recipe.optimizer != "sgd" or not (recipe.steps or seen.examples):
        return 1.0
    nodes = 1 if seen.node is not None else max(1, len(seen.nodes))
    examples = None if seen.examples is None else -(-seen.examples // nodes)
    return float((1 - recipe.lr * recipe.weight_decay) ** len(batches(recipe, examples=examples)))
