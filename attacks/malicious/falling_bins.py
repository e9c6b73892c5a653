"""Images out of neurons that sort a batch by several directions at once: what one direction mixes another one tells apart."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.attacks.malicious.readout import Candidates

_EPS = torch.finfo(torch.float32).eps
_WRONG, _FLAT = 0.5, 1e-2
"""How far outside the box and its bin an image may be believed, and the standard deviation below which it is none."""


def waves(shape: Sequence[int], count: int) -> Tensor:
    """``(count, P)`` float64: the mean of all pixels, then cosine waves of rising frequency along the axes, channels alike."""
    spatial = tuple(shape[1:])
    frequencies = sorted(itertools.product(range(count), repeat=len(spatial)), key=lambda one: (sum(one), one))[:count]
    found = []
    for each in frequencies:
        wave = torch.ones(tuple(shape), dtype=torch.float64)
        for axis, (size, frequency) in enumerate(zip(spatial, each, strict=True)):
            cosine = torch.cos(math.pi * frequency * (torch.arange(size, dtype=torch.float64) + 0.5) / size)
            wave = wave * cosine.view(-1, *[1] * (len(spatial) - 1 - axis))
        found.append(wave.flatten() / math.prod(shape))
    return torch.stack(found)


@dataclass(kw_only=True)
class Cells:
    """A cell for each bin of each direction: the gradient of a neuron less that of the next one, which holds the images between
    both edges, each times the slope at its neurons. An image lies in one cell of every direction, always with the same slope.

    Args:
        towards: ``(D, P)`` float64 the directions.
        edges: ``(D, m + 1)`` float64 lower edges of the bins, and infinity.
        held: ``(D, m, P)`` float64 sums of slope times image.
        slopes: ``(D, m)`` float64 sums of slopes.
        blur: ``(D, m)`` root mean square of the rounding of ``held``.
        doubt: ``(D, m)`` rounding of ``slopes``.
    """

    towards: Tensor
    edges: Tensor
    held: Tensor
    slopes: Tensor
    blur: Tensor
    doubt: Tensor

    @staticmethod
    def of(
        before: tuple[Tensor, Tensor], after: tuple[Tensor, Tensor], *, directions: int, level: float = 1.0, kept: float = 1.0
    ) -> Cells:
        """The cells of a dense layer, each direction's neurons together, with falling biases.

        Args:
            before: weights ``(K, P)`` and biases ``(K,)`` as sent.
            after: the same as returned.
            directions: D, a divisor of K.
            level: what the biases are multiplied by before they are added.
            kept: share of each value that weight decay left over all steps together, in (0, 1].
        """
        (weights, bias), (weights_after, bias_after) = before, after
        rounding = 2 * _EPS * torch.maximum(weights.abs(), weights_after.abs()).double().square().mean(1).sqrt()
        doubt = 2 * _EPS / level * torch.maximum(bias.abs(), bias_after.abs()).double()
        lower = -level * bias.double().view(directions, -1)
        return Cells(
            towards=weights.double().view(directions, -1, weights.shape[1])[:, 0],
            edges=torch.cat([lower, torch.full((directions, 1), torch.inf, dtype=torch.float64)], 1),
            held=_apart(weights_after.double() - kept * weights.double(), directions),
            slopes=_apart(bias_after.double() - kept * bias.double(), directions) / level,
            blur=_together(rounding, directions),
            doubt=_together(doubt, directions),
        )

    @property
    def occupied(self) -> Tensor:
        """``(D, m)`` whether a cell holds more than rounding."""
        return (self.slopes.abs() > self.doubt) | (self.held.square().mean(2).sqrt() > self.blur)

    def candidates(self, *, most: int | None, alike: float = 1e-3) -> Candidates:
        """Images that may be records, the surest first.

        Those that each direction holds something for are preferred, which mixtures seldom meet, then those that show in the most
        directions. What is believed is taken out of its cells in all directions, and leaves others alone there, as in the
        decoding of an invertible Bloom lookup table.

        Args:
            most: no more than this many, where the number of images is known.
            alike: mean square distance below which two images are one.
        """
        found: list[tuple[float, Tensor]] = []
        while (left := self.occupied).any() and (most is None or len(found) < most):
            where, slopes = left.nonzero(), self.slopes[left]
            raw = self.held[left] / torch.where(slopes == 0, 1.0, slopes)[:, None]
            images, wrong = raw.clamp(0, 1), self._wrong(where, raw)
            near = torch.cdist(images, images).square() / images.shape[1] <= alike
            cells = self._cells(raw)
            seen = torch.stack([near[:, where[:, 0] == d].any(1) for d in range(len(self.towards))]).sum(0)
            whole = torch.stack([left[d, cells[:, d]] for d in range(len(self.towards))]).all(0)
            good = (wrong < _WRONG) & (images.std(1) > _FLAT) & ((seen > 1) | whole)
            if not good.any():
                break
            surest = torch.where(good, seen + len(self.towards) * whole - wrong, -torch.inf)
            clear = slopes.abs() / (self.blur[left] + self.doubt[left])
            same = near[int(surest.argmax())] & good
            best = int(torch.where(same, clear, 0.0).argmax())
            found.append((float(seen[best]) / len(self.towards) / (1 + float(wrong[best])), images[best].float()))
            self._take_out(raw[best], float(slopes[best]), cells[best], where[near[best]])
        return self._chosen(found, most=most, alike=alike)

    def _wrong(self, where: Tensor, raw: Tensor) -> Tensor:
        """``(n,)`` how far images lie outside the box [0, 1] and, in widths of the bin, outside their own bin."""
        d, i = where.unbind(1)
        along = (raw * self.towards[d]).sum(1)
        lower, upper = self.edges[d, i], self.edges[d, i + 1]
        width = torch.where(upper.isinf(), self.edges[d, -2] - self.edges[d, 0], upper - lower).clamp_min(1e-30)
        blurred = (self.towards[d].norm(dim=1) * self.blur[d, i] + along.abs() * self.doubt[d, i]) / self.slopes[d, i].abs()
        outside = (torch.maximum(lower - along, along - upper).clamp_min(0) - blurred).clamp_min(0) / width
        excess = (raw - raw.clamp(0, 1)).square().mean(1).sqrt()
        wrong: Tensor = outside.clamp(max=1) + 20 * excess
        return wrong.nan_to_num(torch.inf)

    def _cells(self, images: Tensor) -> Tensor:
        """``(n, D)`` the bin of each image in each direction."""
        along = images @ self.towards.T
        inner = self.edges[:, 1:-1].contiguous()
        bins: list[Tensor] = [torch.searchsorted(edges, one.contiguous()) for edges, one in zip(inner, along.T, strict=True)]
        return torch.stack(bins, 1)

    def _take_out(self, raw: Tensor, slope: float, cells: Tensor, shown: Tensor) -> None:
        """Leave an image out of its cell in every direction; a cell that ``shown`` says held it alone is empty then."""
        alone = dict(shown.tolist())
        for d, i in enumerate(cells.tolist()):
            if d in alone:
                self.held[d, alone[d]], self.slopes[d, alone[d]] = 0.0, 0.0
            else:
                self.held[d, i] -= slope * raw
                self.slopes[d, i] -= slope
                self.blur[d, i] += float(self.blur.max())
                self.doubt[d, i] += float(self.doubt.max())

    def _chosen(self, found: list[tuple[float, Tensor]], *, most: int | None, alike: float) -> Candidates:
        """What was believed, then what else lies in the cells, without doubles."""
        told = self.occupied & (self.slopes != 0)
        raw = self.held[told] / self.slopes[told][:, None]
        doubts = zip(self._wrong(told.nonzero(), raw).tolist(), raw.clamp(0, 1).float(), strict=True)
        rest = [(1 / (1 + wrong) / (1 + len(self.towards)), image) for wrong, image in doubts if float(image.std()) > _FLAT]
        kept: list[tuple[float, Tensor]] = []
        for confidence, image in [*found, *sorted(rest, key=lambda one: -one[0])]:
            if most is not None and len(kept) == most:
                break
            if all(float((image - other).square().mean()) > alike for _, other in kept):
                kept.append((confidence, image))
        kept.sort(key=lambda one: -one[0])
        return Candidates(
            images=torch.stack([image for _, image in kept]) if kept else torch.zeros((0, self.held.shape[2])),
            confidence=torch.tensor([confidence for confidence, _ in kept], dtype=torch.float64),
        )


def _apart(values: Tensor, directions: int) -> Tensor:
    """``(D, m, …)`` each neuron of a direction less the next one."""
    each = values.view(directions, -1, *values.shape[1:])
    return torch.cat([each[:, :-1] - each[:, 1:], each[:, -1:]], 1)


def _together(rounding: Tensor, directions: int) -> Tensor:
    """``(D, m)`` the rounding of a neuron and of the next one together."""
    each = rounding.view(directions, -1)
    return torch.cat([each[:, :-1] + each[:, 1:], each[:, -1:]], 1)
