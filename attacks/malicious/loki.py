"""LOKI: every client gets a model of its own, so that its images stand apart even in a sum over all clients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.attacks.inversion.unroll import batches
from flpriv.attacks.malicious.falling_bins import Cells, waves
from flpriv.attacks.malicious.imprint import quantile_edges, smooth_noise
from flpriv.attacks.malicious.insertion import host, insert
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can


class Block(nn.Module):
    """``(N, *shape)`` to the same shape, through neurons that see a client's images in inputs of its own.

    A convolution of 1x1 kernels copies the channels of an image into the client's group of ``clients`` groups and leaves the
    others zero; a dense layer without bias looks at all groups and, for each, at one more input that is constant, and zero but
    for the client's own group: the weight of that input is the client's own bias. What tells clients apart is never trained.

    Args:
        shape: of one image, ``(C, *spatial)``.
        bins: number of neurons K.
        clients: number of groups.
    """

    def __init__(self, shape: Sequence[int], *, bins: int, clients: int) -> None:
        super().__init__()
        convolution = nn.Conv2d if len(shape) == 3 else nn.Conv3d
        self.routes = convolution(shape[0], clients * shape[0], 1, bias=False).requires_grad_(False)
        self.own = nn.Linear(1, clients, bias=False).requires_grad_(False)
        self.bins = nn.Linear(clients * (math.prod(shape) + 1), bins, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Images as the next layer sees them: with the neurons' mean added to every pixel."""
        constant: Tensor = self.own(images.new_ones(len(images), 1))
        groups = torch.cat([self.routes(images).flatten(1), constant], 1)
        return images + F.relu(self.bins(groups)).mean(1).view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class BlockTrap(Trap):
    """Sends each node the honest model with the block before it that opens the node's own group.

    Args:
        prefix: name of the block in the state.
        weight: ``(K, clients * (P + 1))`` of the dense layer, the same for all nodes.
        level: of the input that bears the bias.
        channels: of an image.
        clients: number of groups.
        dims: spatial dimensions.
        rounds: in which it is sent; none named means all.
    """

    prefix: str
    weight: Tensor
    level: float
    channels: int
    clients: int
    dims: int
    rounds: tuple[int, ...]

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state with the node's block after it.

        Raises:
            FlprivError: if more nodes are addressed than there are groups.
        """
        if self.rounds and round not in self.rounds:
            return None
        if len(nodes) > self.clients:
            raise FlprivError(
                f"loki: {len(nodes)} nodes are addressed in round {round}, but the block has groups for {self.clients}; "
                f"set clients = {len(nodes)}"
            )
        place = nodes.index(node)
        routes = torch.zeros(self.clients, self.channels, self.channels)
        routes[place] = torch.eye(self.channels)
        return {
            **honest,
            f"{self.prefix}.own.weight": self.level * torch.eye(self.clients)[place][:, None],
            f"{self.prefix}.routes.weight": routes.flatten(0, 1).view(-1, self.channels, *[1] * self.dims),
            f"{self.prefix}.bins.weight": self.weight,
        }


@dataclass(frozen=True, kw_only=True)
class Loki(Attack):
    """Sends every node a block that copies its images into inputs of its own, and reads each node's images out of the sum.

    In a sum over nodes the columns of a dense layer's gradient that belong to one node's inputs hold that node's images alone, so
    summing up hides nobody; an input that is constant gives each node its own slopes, exactly. Within a node, images are told
    apart by bins as in ``imprint``, along several directions at once (:mod:`.falling_bins`). Single replies are read alike.
    The block has ``bins * clients * (pixels + 1)`` weights: 12.6 million, 50 MB, for 256 bins, 12 clients and 64x64 pixels. For
    sites that train by SGD; the fewer local steps, the sharper.

    Args:
        bins: number of neurons K, ≥ 1; eight for each image of a client tell nearly all of them apart.
        directions: into which the neurons are divided, ≥ 1 and no more than ``bins``.
        clients: number of nodes that can be told apart, ≥ 1; no fewer than are addressed in a round.
        gain: scale of the block's weights, > 0; larger ones outlast more local steps, smaller ones round less.
        rounds: when the block is sent; none named means every round.
    """

    name: ClassVar[str] = "loki"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS
    paper: ClassVar[str] = "Zhao et al. 2024, https://arxiv.org/abs/2303.12233"

    bins: Annotated[int, Field(ge=1)] = 256
    directions: Annotated[int, Field(ge=1)] = 4
    clients: Annotated[int, Field(ge=1)] = 12
    gain: Annotated[float, Field(gt=0)] = 0.1
    rounds: tuple[int, ...] = (1,)

    @property
    def _each(self) -> int:
        """Neurons of a direction."""
        if self.directions > self.bins:
            raise FlprivError(
                f"{self.name}: {self.directions} directions need as many bins at least; set bins = {self.directions}"
            )
        return self.bins // self.directions

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """``model`` with the block registered as ``loki`` and run on its input; the honest keys stay as they are."""
        return insert(model, Block(task.shape, bins=self._each * self.directions, clients=self.clients), name="loki")

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> BlockTrap:
        """The block's weights: the same direction for all neurons and groups, edges as images like ``public`` lie."""
        images = public.images if public is not None and len(public) else smooth_noise(256, task.shape, rng=rng)
        pixels = math.prod(task.shape)
        towards, each = waves(task.shape, self.directions), self._each
        seen = images.flatten(1).double() @ towards.T
        spread, level = seen.std(0).clamp_min(1e-6), float(images.square().flatten(1).sum(1).mean().sqrt())
        edges = torch.cat([quantile_edges(along, bins=each, rng=rng) for along in (seen / spread).T])
        weight = torch.empty(each * self.directions, self.clients * (pixels + 1))
        rows = (self.gain * towards / spread[:, None]).float().repeat_interleave(each, 0)
        weight[:, : self.clients * pixels] = rows.repeat(1, self.clients)
        weight[:, self.clients * pixels :] = (-self.gain * edges / level).float()[:, None]
        return BlockTrap(
            prefix=f"{host(task.build())}.loki".lstrip("."),
            weight=weight,
            level=level,
            channels=task.shape[0],
            clients=self.clients,
            dims=len(task.spatial),
            rounds=self.rounds,
        )

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each armed node and round: images with ``confidence``, the surest first; perhaps none at all.

        Raises:
            FlprivError: if nothing that went through the block was captured, or a capture does not say to whom it was sent.
        """
        seen = [o for o in capture.observations if o.trap and _key(o.sent) is not None]
        if not seen:
            raise FlprivError(f"{self.name}: no reply to the block was captured; every site refused it, or none took part")
        behind = [(one, node) for one in seen for node in (one.nodes if one.node is None else (one.node,))]
        return [self._read(one, node, capture.task) for one, node in track(behind, self.name)]

    def _read(self, seen: Observation, node: int, task: Task) -> Reconstruction:
        if node not in seen.nodes or len(seen.nodes) > self.clients:
            raise FlprivError(
                f"{self.name}: round {seen.round}: node {node} is none of {len(seen.nodes)} nodes addressed, or these are "
                f"more than clients = {self.clients}; attack with the options that the block was sent with"
            )
        key, place, pixels = _key(seen.sent) or "", seen.nodes.index(node), math.prod(task.shape)
        columns, bias = slice(place * pixels, (place + 1) * pixels), self.clients * pixels + place
        most, kept = _images_and_decay(seen)
        before, after = ((w[:, columns], w[:, bias]) for w in (seen.sent[f"{key}.weight"], seen.returned[f"{key}.weight"]))
        level = float(seen.sent[f"{key.removesuffix('bins')}own.weight"].double().sum())
        cells = Cells.of(before, after, directions=self.directions, level=level, kept=kept)
        found = cells.candidates(most=most)
        return Reconstruction(images=found.images.view(-1, *task.shape), round=seen.round, node=node, confidence=found.confidence)


def _images_and_decay(seen: Observation) -> tuple[int | None, float]:
    """How many images a node can have used at most, and what weight decay left of each weight."""
    if seen.local is None or not (seen.local.steps or seen.examples):
        return seen.examples, 1.0
    each = seen.examples
    if seen.node is None and each is not None:
        each = each if seen.local.steps else max(1, each // len(seen.nodes))
    steps = batches(seen.local, examples=each)
    decay = seen.local.lr * seen.local.weight_decay if seen.local.optimizer == "sgd" else 0.0
    most = seen.examples if seen.node is None and not seen.local.steps else 1 + max(max(batch) for batch in steps)
    return most, (1 - decay) ** len(steps)


def _key(sent: State) -> str | None:
    """The name of the block's dense layer in a state, if it is there."""
    return next((key.removesuffix(".weight") for key in sent if f".{key}".endswith(".loki.bins.weight")), None)
