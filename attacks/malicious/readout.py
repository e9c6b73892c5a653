"""Images out of a crafted dense layer's update, and which of them to believe; nothing here looks at the truth."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

_EPS = torch.finfo(torch.float32).eps


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A dense layer whose neurons look in one direction with falling biases, before and after local training.

    Args:
        weight: ``(K, P)`` as sent.
        bias: ``(K,)`` as sent.
        weight_after: ``(K, P)`` as returned.
        bias_after: ``(K,)`` as returned.
        kept: share of each value that weight decay left over all steps together, in (0, 1].
    """

    weight: Tensor
    bias: Tensor
    weight_after: Tensor
    bias_after: Tensor
    kept: float = 1.0

    def reads(self) -> Iterator[tuple[Tensor, float]]:
        """What each occupied bin holds: the mean of its images ``(P,)`` weighted by their gradients, float64, and how far it lies
        outside its own bin, in widths of the bin.

        Neighbours differ by the images between their edges alone, so a lone image comes back exactly. A bin whose neurons differ
        by less than float32 rounding is empty. A float64 copy is made of one row at a time.
        """
        biases = torch.cat([_moved(self.bias, self.bias_after, self.kept), torch.zeros(1, dtype=torch.float64)])
        doubts = torch.cat([_rounding(self.bias, self.bias_after), torch.zeros(1, dtype=torch.float64)])
        row, doubt = self._row(0)
        for place in range(len(self.bias)):
            following, following_doubt = self._row(place + 1)
            apart, gap = row - following, float(biases[place] - biases[place + 1])
            told_by_bias = abs(gap) > float(doubts[place] + doubts[place + 1])
            if told_by_bias or float(apart.square().mean().sqrt()) > doubt + following_doubt:
                yield self._scaled(place, apart, gap, float(doubts[place] + doubts[place + 1]))
            row, doubt = following, following_doubt

    def _scaled(self, place: int, apart: Tensor, gap: float, doubt: float) -> tuple[Tensor, float]:
        """``apart / gap``; where its projection misses the bin, scaled to reach it: biases round more coarsely than weights."""
        last = place + 1 == len(self.bias)
        lower = -float(self.bias[place])
        upper = math.inf if last else -float(self.bias[place + 1])
        width = float(self.bias[0] - self.bias[-1]) / len(self.bias) if last else upper - lower
        along = float(self.weight[place].double() @ apart)
        if abs(gap) <= doubt:
            edge = lower if place or last else upper
            return apart * (edge / along) if along else torch.zeros_like(apart), 1.0
        seen = along / gap
        inside = min(max(seen, lower), upper)
        outside = max(0.0, abs(seen - inside) - abs(seen * doubt / gap)) / max(width, 1e-30)
        return apart / gap if seen == inside or not along else apart * (inside / along), outside

    def _row(self, place: int) -> tuple[Tensor, float]:
        """How far one neuron's weights moved and the root mean square of their rounding; zero beyond the last neuron."""
        if place == len(self.bias):
            return torch.zeros(self.weight.shape[1], dtype=torch.float64), 0.0
        before, after = self.weight[place], self.weight_after[place]
        return _moved(before, after, self.kept), float(_rounding(before, after).square().mean().sqrt())


@dataclass(frozen=True, kw_only=True)
class Candidates:
    """Images that may be records, the surest first.

    Args:
        images: ``(N, P)`` float32 in [0, 1].
        confidence: ``(N,)`` float64 in (0, 1]; 1 for an image that lies in the box and in its own bin.
    """

    images: Tensor
    confidence: Tensor


def candidates(layer: Layer, *, most: int | None, alike: float = 1e-3) -> Candidates:
    """The images of all occupied bins that could be images.

    Mixtures of several images with weights of both signs, and noise, leave the box [0, 1] or the bin they were read from; the
    further, the lower the confidence. Flat ones are dropped, and of those closer than ``alike`` (mean square) the surest stays.

    Args:
        layer: before and after.
        most: no more than this many, where the number of images behind the update is known.
        alike: mean square distance below which two images are one.
    """
    found: list[tuple[float, Tensor]] = []
    for raw, outside in layer.reads():
        image = raw.clamp(0, 1)
        excess = float((raw - image).square().mean().sqrt())
        if math.isfinite(excess) and float(image.std()) > 1e-2:
            found.append((1 / (1 + min(outside, 1) + 20 * excess), image.float()))
    kept: list[tuple[float, Tensor]] = []
    for confidence, image in sorted(found, key=lambda one: -one[0]):
        if most is not None and len(kept) == most:
            break
        if all(float((image - other).square().mean()) > alike for _, other in kept):
            kept.append((confidence, image))
    return Candidates(
        images=torch.stack([image for _, image in kept]) if kept else torch.zeros((0, layer.weight.shape[1])),
        confidence=torch.tensor([confidence for confidence, _ in kept], dtype=torch.float64),
    )


def _moved(before: Tensor, after: Tensor, kept: float) -> Tensor:
    return after.double() - kept * before.double()


def _rounding(before: Tensor, after: Tensor) -> Tensor:
    """Twice the spacing of float32 at the larger of both."""
    return 2 * _EPS * torch.maximum(before.abs(), after.abs()).double()
