"""The dense layer that sees the images, and what a site's update says about any layer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flpriv.attacks.inversion.unroll import batches
from flpriv.capture import Observation
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.task import Task


@dataclass(frozen=True, kw_only=True)
class FirstLayer:
    """A dense layer whose inputs are the pixels of a whole image.

    Args:
        name: of the module.
        neurons: how many.
        rectified: whether an image that leaves a neuron negative gives it no gradient, as before a ReLU.
    """

    name: str
    neurons: int
    rectified: bool


def first_layer(task: Task, *, who: str) -> FirstLayer:
    """The first layer with weights of the task's model, found by running the model.

    Raises:
        FlprivError: if it is not dense, has no bias, or sees anything but the normalised pixels.
    """
    model = task.build().eval()
    images = torch.rand((8, *task.shape), generator=torch.Generator().manual_seed(0))
    name, layer, seen = _first(model, images)
    if not isinstance(layer, nn.Linear):
        raise FlprivError(
            f"{who}: the first layer with weights, {name!r}, is a {type(layer).__name__}; images are read off an nn.Linear"
        )
    if layer.bias is None:
        raise FlprivError(f"{who}: the first layer, {name!r}, has no bias, which gives images their scale; leave the attack out")
    pixels = (images.flatten(1) - task.mean) / task.std
    if layer.in_features != prod(task.shape) or not torch.allclose(seen.flatten(1), pixels, atol=1e-4):
        raise FlprivError(f"{who}: the first layer, {name!r}, does not see the pixels as they are; leave the attack out")
    return FirstLayer(name=name, neurons=layer.out_features, rectified=_rectified(model, layer, images))


class _Reached(Exception):
    """Ends a forward pass at the first layer with weights."""

    def __init__(self, name: str, layer: nn.Module, seen: Tensor) -> None:
        super().__init__(name)
        self.name, self.layer, self.seen = name, layer, seen


def _first(model: nn.Module, images: Tensor) -> tuple[str, nn.Module, Tensor]:
    def stop(layer: nn.Module, args: tuple[Tensor, ...], *, name: str) -> None:
        raise _Reached(name, layer, args[0])

    owners = [(name, part) for name, part in model.named_modules() if next(part.parameters(recurse=False), None) is not None]
    hooks = [part.register_forward_pre_hook(partial(stop, name=name)) for name, part in owners]
    try:
        model(images)
    except _Reached as reached:
        return reached.name, reached.layer, reached.seen
    finally:
        for hook in hooks:
            hook.remove()
    raise FlprivError("the model runs none of its layers with weights")


def _rectified(model: nn.Module, layer: nn.Module, images: Tensor) -> bool:
    outputs, slopes = slopes_at(model, layer, images, torch.zeros(len(images), dtype=torch.long))
    heard = (slopes != 0)[outputs > 0]
    return not bool(slopes[outputs < 0].any()) and int(heard.sum()) > len(heard) / 2


def slopes_at(model: nn.Module, layer: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The outputs of ``layer`` and the gradient of each image's own loss in them, ``(N, neurons)`` each."""
    kept: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, output: kept.append(output))
    try:
        loss = cross_entropy(model(images), labels, reduction="sum")
    finally:
        hook.remove()
    (slopes,) = torch.autograd.grad(loss, kept[0])
    return kept[0].detach(), slopes


def descent(seen: Observation, names: Iterable[str]) -> dict[str, Tensor]:
    """What SGD took off the named parameters, float64: their gradient times a positive number, the same for all of them.

    One plain step takes off the gradient, several take off a sum over steps. The pull of weight decay is put back.
    """
    kept = _kept(seen.local, seen.examples) if seen.local is not None else 1.0
    return {name: kept * seen.sent[name].double() - seen.returned[name].double() for name in names}


def _kept(recipe: LocalRecipe, examples: int | None) -> float:
    """What weight decay alone leaves of a weight of 1 after all local steps."""
    if not recipe.weight_decay:
        return 1.0
    weight, velocity = 1.0, 0.0
    for _ in batches(recipe, examples=examples):
        velocity = recipe.momentum * velocity + recipe.weight_decay * weight
        weight -= recipe.lr * velocity
    return weight


def require_sgd(seen: Observation, *, who: str) -> None:
    """Updates of other optimisers are no sums of gradients.

    Raises:
        FlprivError: if the local recipe is known and its optimiser is not SGD.
    """
    if seen.local is not None and seen.local.optimizer != "sgd":
        raise FlprivError(
            f"{who}: the sites train with {seen.local.optimizer!r}, whose update is no sum of gradients; "
            "set local.optimizer = 'sgd' or leave the attack out"
        )


def images_behind(seen: Observation) -> int | None:
    """How many distinct images the recipe lets a site use in its round; ``None`` where that is not known."""
    if seen.local is None or (seen.local.steps is None and not seen.examples):
        return None
    return 1 + max(max(batch) for batch in batches(seen.local, examples=seen.examples))
