"""A dense ReLU layer that a malicious server fills with rows of its choice: where it stands, how it is sent, how it is read."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.attacks.inversion.first_layer import descent
from flpriv.attacks.inversion.unroll import batches
from flpriv.attacks.malicious.imprint import smooth_noise
from flpriv.attacks.malicious.insertion import host, insert
from flpriv.attacks.malicious.passage import Passage, passage
from flpriv.attacks.malicious.sparse_rows import Rows, images_in, one_a_row
from flpriv.capture import Capture, Observation
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task

Placement = Literal["inserted", "parameters"]
Connection = Literal["addition", "linear"]
Crafted = tuple[Tensor, Tensor]
"""Weights ``(K, P)`` and biases ``(K,)`` of the layer, float32."""


class Block(nn.Module):
    """``(N, *shape)`` to the same shape, through a dense ReLU layer over all pixels.

    Args:
        shape: of one image.
        neurons: K.
        connection: ``"addition"`` adds the neurons' mean to every pixel; ``"linear"`` puts a dense layer of them in its place.
        carry: factor on the neurons' mean where it is added.
    """

    def __init__(self, shape: Sequence[int], *, neurons: int, connection: Connection, carry: float = 1.0) -> None:
        super().__init__()
        self.carry = carry
        self.neurons = nn.Linear(math.prod(shape), neurons)
        self.back = nn.Linear(neurons, math.prod(shape)) if connection == "linear" else None

    def forward(self, images: Tensor) -> Tensor:
        """Images as the next layer sees them."""
        fired: Tensor = F.relu(self.neurons(images.flatten(1)))
        if self.back is not None:
            replaced: Tensor = self.back(fired)
            return replaced.view_as(images)
        return images + self.carry * fired.mean(1).view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class CraftedTrap(Trap):
    """Sends the honest model with entries of the operator's own, added to it or in place of its own.

    Args:
        entries: of the state sent.
        rounds: in which it is sent; none named means all.
    """

    entries: State
    rounds: tuple[int, ...]

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state with the entries in it, to every node."""
        return {**honest, **self.entries} if not self.rounds or round in self.rounds else None

    def disarm(self, returned: State, *, sent: State, honest: State) -> State:
        """The honest model, with the update of its layers where they were sent as they are: what others learned is worthless."""
        if self.entries.keys() & honest.keys():
            return dict(honest)
        return super().disarm(returned, sent=sent, honest=honest)


@dataclass(frozen=True, kw_only=True)
class CraftedLayerAttack(Attack):
    """Base of attacks that fill one dense ReLU layer: a plugin writes :meth:`craft`.

    Args:
        neurons: K of an inserted layer, ≥ 1; a layer of the model's own has as many as it has.
        placement: ``"inserted"`` ships a model definition with one more layer before the first; ``"parameters"`` leaves the
            definition alone and sets the weights of the model's own first hidden dense layer, and of the convolutions before it
            so that they pass the image on: a multilayer perceptron, or convolutions, ReLUs and pooling before two dense layers.
            None of flpriv's own models is one: they have no hidden dense layer, or one that sees parts of the image (vit).
        connection: how an inserted layer joins the model, see :class:`Block`.
        carry: factor on what the neurons hand on, > 0. Gradients grow with it and drown noise that sites add, until they are
            clipped; it disturbs the model as much as larger weights do, and larger steps of several upset the layer.
        batch: number of images behind a reply (or a sum) that the layer is tuned for, ≥ 2.
        rounds: when it is sent; none named means every round.
        read: ``"jointly"`` takes each image found off all neurons it fires, and so finds others behind it; ``"singly"`` divides
            each neuron's weights by its bias, as published, and offers all that comes of it.
    """

    neurons: Annotated[int, Field(ge=1)] = 512
    placement: Placement = "inserted"
    connection: Connection = "addition"
    carry: Annotated[float, Field(gt=0)] = 1.0
    batch: Annotated[int, Field(ge=2)] = 16
    rounds: tuple[int, ...] = (1,)
    read: Literal["jointly", "singly"] = "jointly"

    @abstractmethod
    def craft(self, images: Tensor, *, neurons: int, rng: torch.Generator) -> Crafted:
        """The layer, for inputs like ``images`` ``(N, P)`` in [0, 1]."""

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """``model``, with the block registered as ``crafted`` and run on its input where one is inserted."""
        if self.placement == "inserted":
            block = Block(task.shape, neurons=self.neurons, connection=self.connection, carry=self.carry)
            return insert(model, block, name="crafted")
        return model

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> CraftedTrap:
        """The layer's weights, made for images like ``public`` or, where none are granted, smooth random ones.

        Raises:
            FlprivError: if the layer is to be one of the model's own and the model has none that sees the image.
        """
        images = public.images if public is not None and len(public) else smooth_noise(256, task.shape, rng=rng)
        if self.placement == "parameters":
            way = passage(task, who=self.name)
            weight, bias = self.craft(way.features(images), neurons=way.neurons, rng=rng)
            return CraftedTrap(entries=way.entries(weight, bias, carry=self.carry, rng=rng), rounds=self.rounds)
        weight, bias = self.craft(images.flatten(1), neurons=self.neurons, rng=rng)
        prefix = f"{host(task.build())}.crafted".lstrip(".")
        entries = {f"{prefix}.neurons.weight": weight, f"{prefix}.neurons.bias": bias}
        if self.connection == "linear":
            size = math.prod(task.shape)
            entries[f"{prefix}.back.weight"] = torch.full((size, self.neurons), self.carry / self.neurons)
            entries[f"{prefix}.back.bias"] = torch.zeros(size)
        return CraftedTrap(entries=entries, rounds=self.rounds)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each armed reply or sum: images with ``confidence``, the surest first; perhaps none at all.

        Raises:
            FlprivError: if no reply to the crafted layer was captured.
        """
        way = passage(capture.task, who=self.name) if self.placement == "parameters" else None
        seen = [(o, key) for o in capture.observations if o.trap and (key := _key(o.sent, way)) is not None]
        if not seen:
            raise FlprivError(f"{self.name}: no reply to the crafted layer was captured; every site refused it or stayed away")
        jointly = self.read == "jointly"
        return [_read(observation, key, capture.task, way, rng, jointly) for observation, key in track(seen, self.name)]


def _read(seen: Observation, key: str, task: Task, way: Passage | None, rng: torch.Generator, jointly: bool) -> Reconstruction:
    names = (f"{key}.weight", f"{key}.bias")
    moved = descent(seen if seen.node is not None else _share(seen), names)
    sent, lost = (seen.sent[names[0]], seen.sent[names[1]]), (moved[names[0]], moved[names[1]])
    if way is not None:
        sent, lost = way.sent(*sent), way.lost(*lost)
    found = images_in(Rows.of(*sent, *lost), most=_most(seen), rng=rng) if jointly else one_a_row(*lost)
    images = found.images.view(-1, *task.shape) if way is None else way.images(found.images)
    return Reconstruction(images=images.clamp(0, 1).float(), round=seen.round, node=seen.node, confidence=found.confidence)


def _share(total: Observation) -> Observation:
    """A sum as the reply of one node with as many examples as each has on average."""
    return replace(total, examples=max(1, total.examples // max(1, len(total.nodes))) if total.examples else None)


def _most(seen: Observation) -> int | None:
    """The largest number of images that can be behind a reply or sum, where that is known."""
    if seen.local is None or seen.local.steps is None:
        return seen.examples
    each = 1 + max(max(batch) for batch in batches(seen.local, examples=seen.examples if seen.node is not None else None))
    used = each if seen.node is not None else each * max(1, len(seen.nodes))
    return min(used, seen.examples or used)


def _key(sent: State, way: Passage | None) -> str | None:
    """The name of the crafted dense layer in a state, if it is there."""
    if way is not None:
        return way.layer if f"{way.layer}.weight" in sent else None
    return next((key.removesuffix(".weight") for key in sent if f".{key}".endswith(".crafted.neurons.weight")), None)
