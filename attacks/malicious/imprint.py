"""Imprint: a block before the first layer that sorts a batch into bins and hands the images back in its gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.attacks.malicious import behind
from flpriv.attacks.malicious.insertion import host, insert, prefix
from flpriv.attacks.malicious.readout import Layer, candidates
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can

Direction = Literal["mean", "random", "fourier"]
Connection = Literal["addition", "linear"]


class Block(nn.Module):
    """``(N, *shape)`` to the same shape, through ``bins`` neurons that all look in one direction.

    Args:
        shape: of one image.
        bins: number of neurons K.
        connection: ``"addition"`` adds the neurons' mean to every pixel; ``"linear"`` puts a dense layer of them in its place.
    """

    def __init__(self, shape: Sequence[int], *, bins: int, connection: Connection) -> None:
        super().__init__()
        self.bins = nn.Linear(math.prod(shape), bins)
        self.back = nn.Linear(bins, math.prod(shape)) if connection == "linear" else None

    def forward(self, images: Tensor) -> Tensor:
        """Images as the next layer sees them."""
        fired: Tensor = F.relu(self.bins(images.flatten(1)))
        if self.back is not None:
            replaced: Tensor = self.back(fired)
            return replaced.view_as(images)
        return images + fired.mean(1).view(-1, *[1] * (images.dim() - 1))


@dataclass(frozen=True, kw_only=True)
class BlockTrap(Trap):
    """Sends the honest model with a filled block before it.

    Args:
        entries: the block's own entries of the state.
        rounds: in which it is sent; none named means all.
    """

    entries: State
    rounds: tuple[int, ...]

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state with the block's entries after it, to every node."""
        return {**honest, **self.entries} if not self.rounds or round in self.rounds else None


@dataclass(frozen=True, kw_only=True)
class Imprint(Attack):
    """Sends a block that sorts each batch by one projection, then reads single images from differences of neighbouring neurons.

    Neuron i fires for images whose projection exceeds edge i. The gradients of neighbours differ by the images between their
    edges alone: one image there comes back exactly, several come back mixed. Edges are quantiles of public images, or of smooth
    random images where none are granted. Meant for sites that train by SGD; the fewer local steps, the sharper.

    Args:
        bins: number of neurons, ≥ 1; of B images a share of (1 - 1/bins)^(B - 1) sits alone where the bins are equally likely.
        direction: what images are sorted by: ``"mean"`` intensity, a ``"random"`` direction, or a low ``"fourier"`` frequency.
        connection: how the block joins the model, see :class:`Block`.
        gain: scale of the block's weights, > 0; larger ones outlast more local steps and disturb the model more.
        rounds: when the block is sent; none named means every round.
    """

    name: ClassVar[str] = "imprint"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS
    paper: ClassVar[str] = "Fowl et al. 2022, https://arxiv.org/abs/2110.13057"

    bins: Annotated[int, Field(ge=1)] = 256
    direction: Direction = "mean"
    connection: Connection = "addition"
    gain: Annotated[float, Field(gt=0)] = 0.1
    rounds: tuple[int, ...] = (1,)

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """``model`` with the block registered as ``imprint`` and run on its input; the honest keys stay as they are."""
        return insert(model, Block(task.shape, bins=self.bins, connection=self.connection), name="imprint")

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> BlockTrap:
        """The block's weights: one direction for all neurons, edges where images like ``public`` are equally likely between."""
        images = public.images if public is not None and len(public) else smooth_noise(256, task.shape, rng=rng)
        towards = _direction(self.direction, task.shape, rng=rng)
        seen = images.flatten(1) @ towards
        towards, seen = towards / seen.std().clamp_min(1e-6), (seen / seen.std().clamp_min(1e-6)).double()
        edges = quantile_edges(seen, bins=self.bins, rng=rng)
        place = f"{host(task.build())}.imprint".lstrip(".")
        entries = {
            f"{place}.bins.weight": (self.gain * towards).repeat(self.bins, 1),
            f"{place}.bins.bias": (-self.gain * edges).float(),
        }
        if self.connection == "linear":
            size = math.prod(task.shape)
            entries[f"{place}.back.weight"] = torch.full((size, self.bins), 1 / self.bins)
            entries[f"{place}.back.bias"] = torch.zeros(size)
        return BlockTrap(entries=entries, rounds=self.rounds)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each armed node and round: images with ``confidence``, the surest first; perhaps none at all.

        Raises:
            FlprivError: if no reply to the block was captured.
        """
        seen = [o for o in capture.observations if o.trap and prefix(o.sent, self.name) is not None]
        if not seen:
            raise FlprivError(f"{self.name}: no reply to the block was captured; every site refused it, or none took part")
        return [self._read(observation, capture.task) for observation in track(seen, self.name)]

    def _read(self, seen: Observation, task: Task) -> Reconstruction:
        key = f"{prefix(seen.sent, self.name)}.bins"
        layer = Layer(
            weight=seen.sent[f"{key}.weight"],
            bias=seen.sent[f"{key}.bias"],
            weight_after=seen.returned[f"{key}.weight"],
            bias_after=seen.returned[f"{key}.bias"],
            kept=behind.kept(seen),
        )
        found = candidates(layer, most=behind.images(seen))
        return Reconstruction(
            images=found.images.view(-1, *task.shape), round=seen.round, node=seen.node, confidence=found.confidence
        )


def quantile_edges(projections: Tensor, *, bins: int, rng: torch.Generator) -> Tensor:
    """``(bins,)`` rising edges; a new image falls between any two, or above the last, equally often.

    The first edge lies below every image. ``projections`` ``(N,)`` are smoothed by a Gaussian of Silverman's width, since a few
    images say little about the tails.
    """
    spread = float(projections.std())
    width = 0.9 * spread * len(projections) ** -0.2
    draws = projections.repeat(math.ceil(20000 / len(projections)))
    draws = draws + width * torch.randn(len(draws), generator=rng, dtype=draws.dtype)
    edges = torch.quantile(draws, torch.arange(bins, dtype=draws.dtype) / bins)
    edges[0] = projections.min() - 4 * spread
    return edges


def smooth_noise(images: int, shape: Sequence[int], *, rng: torch.Generator) -> Tensor:
    """``(images, *shape)`` in [0, 1]: a normal mean intensity and normal low frequencies, for want of public images."""
    spatial = tuple(shape[1:])
    mode = "bilinear" if len(spatial) == 2 else "trilinear"
    level = 0.5 + 0.15 * torch.randn((images, 1, *[1] * len(spatial)), generator=rng)
    coarse = torch.randn((images, shape[0], *[min(8, size) for size in spatial]), generator=rng)
    return (level + 0.2 * F.interpolate(coarse, size=spatial, mode=mode)).clamp(0, 1)


def _direction(kind: Direction, shape: Sequence[int], *, rng: torch.Generator) -> Tensor:
    """``(P,)`` float32 over the pixels of one image, in the order of ``flatten``."""
    if kind == "mean":
        return torch.full((math.prod(shape),), 1 / math.prod(shape))
    if kind == "random":
        return torch.randn(math.prod(shape), generator=rng) / math.prod(shape)
    wave = torch.ones(tuple(shape))
    for axis, size in enumerate(shape[1:], start=1):
        frequency = int(torch.randint(1, 4, (1,), generator=rng))
        cosine = torch.cos(math.pi * frequency * (torch.arange(size) + 0.5) / size)
        wave = wave * cosine.view(-1, *[1] * (len(shape) - 1 - axis))
    return wave.flatten() / math.prod(shape)
