"""The way of an image to a model's own first hidden dense layer, with the convolutions before it set to pass it on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flpriv.errors import FlprivError
from flpriv.task import Task

_FEWEST = 64
"""Values of an image that must reach the dense layer."""
_PASSED = 0.1
"""Root mean square error of an image read back from what reaches the layer, above which it did not get there."""


@dataclass(frozen=True, kw_only=True)
class Channel:
    """What one channel carries: at place p of its grid the mean of a box of pixels of ``source`` from ``step * p + offset`` on.

    Args:
        source: channel of the image.
        offset: of the box, one number an axis.
    """

    source: int
    offset: tuple[int, ...]

    def behind(self, places: tuple[int, ...], step: tuple[int, ...]) -> Channel:
        """The channel that takes the value so many ``places`` on, of a grid of this ``step``."""
        moved = (o + s * x for o, s, x in zip(self.offset, step, places, strict=True))
        return Channel(source=self.source, offset=tuple(moved))


@dataclass(frozen=True, kw_only=True)
class Passage:
    """How images reach a hidden dense layer once the convolutions before it are set.

    Args:
        task: whose model it is.
        layer: name of the dense layer.
        neurons: of it.
        after: name of the dense layer that the neurons go to.
        kernels: entries of the state that make the convolutions pass the image on.
        channels: what each channel before the dense layer carries; the channels beyond are zero. Empty where there is no
            convolution and the layer sees normalised pixels.
        grid: shape of a channel before the dense layer.
        step: pixels from one place of the grid to the next, one number an axis.
        exact: whether all pixels get there; otherwise the image gets there coarser.
    """

    task: Task
    layer: str
    neurons: int
    after: str
    kernels: dict[str, Tensor]
    channels: tuple[Channel, ...]
    grid: tuple[int, ...]
    step: tuple[int, ...]
    exact: bool

    def features(self, images: Tensor) -> Tensor:
        """``(N, P)``: what images ``(N, *shape)`` in [0, 1] show the dense layer, in [0, 1] and without the channels of zeros."""
        if not self.channels:
            return images.flatten(1)
        model = self.task.build().eval()
        model.load_state_dict({**model.state_dict(), **self.kernels})
        return _arriving(model, self.layer, images)[:, : self._used()]

    def images(self, features: Tensor) -> Tensor:
        """``(N, *shape)`` of the features of images, as ``(N, P)``: exact, or as fine as what got there."""
        if not self.channels:
            return features.view(-1, *self.task.shape)
        grids = features.view(-1, len(self.channels), *self.grid)
        total = torch.zeros((len(features), *self.task.shape), dtype=features.dtype)
        times = torch.zeros(self.task.shape, dtype=features.dtype)
        for place, channel in enumerate(self.channels):
            if self.exact:
                at = [slice(o, None, s) for o, s in zip(channel.offset, self.step, strict=True)]
                target = total[:, channel.source][slice(None), *at]
                target += grids[:, place][slice(None), *(slice(0, size) for size in target.shape[1:])]
                times[channel.source][*at] += 1
            else:
                mode = "bilinear" if len(self.grid) == 2 else "trilinear"
                fine = F.interpolate(grids[:, place : place + 1], size=self.task.spatial, mode=mode, align_corners=False)
                total[:, channel.source] += fine[:, 0]
                times[channel.source] += 1
        return total / times

    def entries(self, weight: Tensor, bias: Tensor, *, carry: float = 1.0, rng: torch.Generator) -> dict[str, Tensor]:
        """The entries of the state for a dense layer ``(K, P)`` over :meth:`features`.

        The layer after it weighs all neurons alike, in proportion to ``carry``, so that an image sends the same to each it fires.
        """
        model = self.task.build()
        dense, after = model.get_submodule(self.layer), model.get_submodule(self.after)
        assert isinstance(dense, nn.Linear) and isinstance(after, nn.Linear)
        full = torch.zeros_like(dense.weight)
        if self.channels:
            full[:, : self._used()] = weight
        else:
            full, bias = weight * self.task.std, bias + self.task.mean * weight.sum(1)
        onward = 1.5 ** -torch.randperm(after.out_features, generator=rng).clamp(max=12).float()
        return {
            **self.kernels,
            f"{self.layer}.weight": full.detach(),
            f"{self.layer}.bias": bias,
            f"{self.after}.weight": (carry * onward[:, None] / self.neurons).repeat(1, self.neurons),
        }

    def sent(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """The dense layer of a state over :meth:`features`, float64: what :meth:`entries` was given."""
        weight, bias = weight.double(), bias.double()
        if self.channels:
            return weight[:, : self._used()], bias
        weight = weight / self.task.std
        return weight, bias - self.task.mean * weight.sum(1)

    def lost(self, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """What the dense layer lost, over :meth:`features`, float64."""
        weight, bias = weight.double(), bias.double()
        if self.channels:
            return weight[:, : self._used()], bias
        return weight * self.task.std + self.task.mean * bias[:, None], bias

    def _used(self) -> int:
        return len(self.channels) * math.prod(self.grid)


def passage(task: Task, *, who: str) -> Passage:
    """The way to the first hidden dense layer of the task's model, found by running the model.

    Convolutions get kernels of a single 1: of stride 1 they pass the image on, and of stride s those with s^d times as many
    channels as carry it pass all its pixels, each channel those of one place in every s x s. With fewer channels, or through
    pooling, a coarser image gets there.

    Raises:
        FlprivError: naming the model, and the layer in the way: if the first dense layer that sees the whole image is the last
            layer, or no ReLU and dense layer follow it, or something else than convolutions with ReLUs stands before it.
    """
    model = task.build().eval()
    images = torch.rand((2, *task.shape), generator=torch.Generator().manual_seed(0))
    seen = _trace(model, images)

    def refuse(why: str) -> FlprivError:
        return FlprivError(
            f"{who}: model {task.model!r} has no hidden dense layer that an image can be brought to: {why}; "
            "set placement = 'inserted'"
        )

    places = [i for i, call in enumerate(seen) if isinstance(call.module, nn.Linear)]
    if not places:
        raise refuse("it has no dense layer")
    first = seen[places[0]]
    if first.given.dim() != 2:
        raise refuse(f"layer {first.name!r} sees parts of the image one by one")
    after = next((seen[i] for i in places[1:] if _goes_on(first, seen[i])), None)
    if after is None:
        what = "is its last layer" if len(places) == 1 else "is not followed by a ReLU and another dense layer"
        raise refuse(f"the first dense layer, {first.name!r}, {what}")
    before = [call for call in seen[: places[0]] if next(call.module.parameters(recurse=False), None) is not None]
    way = _Way(task)
    for call in before:
        if not isinstance(call.module, nn.Conv2d | nn.Conv3d):
            raise refuse(f"layer {call.name!r} before it is a {type(call.module).__name__}")
        if why := way.convolution(call.name, call.module, call.given, call.got):
            raise refuse(f"layer {call.name!r} {why}")
    if before:
        if why := way.pool(_grid(first.given, channels=before[-1].got.shape[1], of=before[-1].got)):
            raise refuse(why)
        if math.prod(way.grid) * len(way.channels) < _FEWEST:
            raise refuse(f"no more than {math.prod(way.grid)} numbers of each channel are left before layer {first.name!r}")
    assert isinstance(first.module, nn.Linear)
    found = Passage(
        task=task,
        layer=first.name,
        neurons=first.module.out_features,
        after=after.name,
        kernels=way.kernels,
        channels=way.channels if before else (),
        grid=way.grid,
        step=way.step,
        exact=way.exact,
    )
    if first.given.shape[1] < found.features(images).shape[1] or not _passes(found):
        raise refuse(f"what stands before layer {first.name!r} alters the image")
    return found


@dataclass(frozen=True)
class _Call:
    """One run of a module without children: its name, itself, what it was given and what it gave."""

    name: str
    module: nn.Module
    given: Tensor
    got: Tensor


class _Way:
    """Kernels set one after another, and what the channels carry behind the last of them."""

    def __init__(self, task: Task) -> None:
        dims = len(task.spatial)
        self.task, self.kernels = task, dict[str, Tensor]()
        self.channels = tuple(Channel(source=c, offset=(0,) * dims) for c in range(task.shape[0]))
        self.grid, self.step, self.exact = task.spatial, (1,) * dims, True

    def convolution(self, name: str, conv: nn.Conv2d | nn.Conv3d, given: Tensor, got: Tensor) -> str:
        """Set the kernels of ``conv``; why they cannot be, else nothing."""
        if why := self.pool(tuple(given.shape[2:])):
            return why
        if conv.groups != 1 or conv.padding_mode != "zeros" or isinstance(conv.padding, str):
            return "is a convolution in groups or with unusual padding"
        stride, reach = conv.stride, zip(conv.kernel_size, conv.padding, conv.dilation, strict=True)
        taps = [{u * d - q: u for u in range(k)} for k, q, d in reach]
        wanted = list(product(*map(range, stride)))
        able = [r for r in wanted if all(x in tap for x, tap in zip(r, taps, strict=True))]
        if not able:
            return "has kernels that do not reach the image"
        kernel = torch.zeros_like(conv.weight)
        spread = len(able) == len(wanted) and len(self.channels) * len(able) <= conv.out_channels
        if spread:
            carried = [(i, r) for r in able for i in range(len(self.channels))]
            for out, (i, r) in enumerate(carried):
                kernel[(out, i, *(tap[x] for x, tap in zip(r, taps, strict=True)))] = 1
            channels = tuple(self.channels[i].behind(r, self.step) for i, r in carried)
        else:
            sources = sorted({channel.source for channel in self.channels})
            if len(sources) > conv.out_channels:
                return f"has {conv.out_channels} channels for the image's {len(sources)}"
            for out, source in enumerate(sources):
                own = [i for i, channel in enumerate(self.channels) if channel.source == source]
                for i, r in product(own, able):
                    kernel[(out, i, *(tap[x] for x, tap in zip(r, taps, strict=True)))] = 1 / (len(own) * len(able))
            channels = tuple(Channel(source=source, offset=(0,) * len(stride)) for source in sources)
            self.exact = False
        bias = torch.zeros(conv.out_channels)
        if not self.kernels:
            kernel, bias[: len(channels)] = kernel * self.task.std, self.task.mean
        self.kernels[f"{name}.weight"] = kernel.detach()
        if conv.bias is not None:
            self.kernels[f"{name}.bias"] = bias
        self.channels, self.grid = channels, tuple(got.shape[2:])
        self.step = tuple(s * t for s, t in zip(self.step, stride, strict=True))
        return ""

    def pool(self, grid: tuple[int, ...]) -> str:
        """Note that something without weights made the grid coarser; why that cannot be followed, else nothing."""
        if len(grid) != len(self.grid) or any(not new or old // new < 1 for old, new in zip(self.grid, grid, strict=True)):
            return "sees the image in another arrangement"
        if grid != self.grid:
            self.step = tuple(s * (old // new) for s, old, new in zip(self.step, self.grid, grid, strict=True))
            self.grid, self.exact = grid, False
        return ""


def _trace(model: nn.Module, images: Tensor) -> list[_Call]:
    """The runs of all modules without children, in order."""
    calls: list[_Call] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], output: Tensor, *, name: str) -> None:
        calls.append(_Call(name, module, args[0].detach(), output.detach()))

    leaves = [(name, part) for name, part in model.named_modules() if not list(part.children())]
    hooks = [part.register_forward_hook(partial(note, name=name)) for name, part in leaves]
    try:
        model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return calls


def _arriving(model: nn.Module, layer: str, images: Tensor) -> Tensor:
    """What a layer is given, ``(N, …)``."""
    kept: list[Tensor] = []
    hook = model.get_submodule(layer).register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    try:
        with torch.no_grad():
            model(images)
    finally:
        hook.remove()
    return kept[0]


def _goes_on(layer: _Call, other: _Call) -> bool:
    """Whether ``other`` is given what ``layer`` gave, after a ReLU."""
    return other.given.shape == layer.got.shape and torch.equal(other.given, layer.got.relu())


def _grid(flat: Tensor, *, channels: int, of: Tensor) -> tuple[int, ...]:
    """The grid of ``channels`` channels that were flattened, made coarser alike along each axis; empty where there is none."""
    places = flat.shape[1] / channels
    for factor in range(1, 1 + max(of.shape[2:])):
        grid = tuple(size // factor for size in of.shape[2:])
        if math.prod(grid) == places:
            return grid
    return ()


def _passes(way: Passage) -> bool:
    """Whether smooth images come back from what they show the dense layer."""
    rng = torch.Generator().manual_seed(1)
    coarse = torch.rand((4, way.task.shape[0], *[3] * len(way.task.spatial)), generator=rng)
    mode = "bilinear" if coarse.dim() == 4 else "trilinear"
    images = F.interpolate(coarse, size=way.task.spatial, mode=mode)
    features = way.features(images)
    if features.shape[1] != len(way.channels) * math.prod(way.grid) and way.channels:
        return False
    error = float((way.images(features) - images).square().mean().sqrt())
    return error < (1e-4 if way.exact else _PASSED)
