"""Images out of the update of a crossed layer, and how far to believe each; nothing here looks at the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.attacks.malicious.cells import Item, Where, untangle

_SKETCH = 1024
"""Pixels by which images are told apart; the images themselves are put together from all."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Images that may be records, the surest first.

    Args:
        images: ``(N, P)`` float32 in [0, 1].
        confidence: ``(N,)`` float64 in (0, 1]; 1 for an image that lies in the box and in its own bins.
        owner: ``(N,)`` which client's neuron tells of each, 0 where clients are not told apart.
    """

    images: Tensor
    confidence: Tensor
    owner: Tensor


@dataclass(frozen=True, kw_only=True)
class CrossedLayer:
    """The update of neurons that answer to one bin each, those of each direction after another, then one for each client.

    Args:
        weight: ``(K, P)`` float32, a row is the weighted sum of the images in the neuron's bin.
        bias: ``(K,)`` float64, the sum of their weights.
        towards: ``(directions, P)`` float32, what images are sorted by.
        lower: ``(K,)`` float64, lower edge of each bin.
        upper: ``(K,)`` float64, upper edge.
        clients: how many neurons tell of clients.
    """

    weight: Tensor
    bias: Tensor
    towards: Tensor
    lower: Tensor
    upper: Tensor
    clients: int = 0

    def read(self, *, most: int | None) -> Read:
        """All images the layer tells of, at most ``most``. A row of ``weight`` is looked at only where its bin is not empty."""
        bins = len(self.bias) - self.clients
        per = bins // len(self.towards)
        sides = tuple(range(start, start + per) for start in range(0, bins, per))
        where = Where(moments=self._moments(bins), lower=self.lower[:bins], upper=self.upper[:bins], sides=sides)
        contents = self._sketch()
        items = untangle(contents[:bins], where, most=most)
        parts = torch.zeros(len(items), bins, dtype=torch.float64)
        for row, item in enumerate(items):
            parts[row, list(item.parts)] = torch.tensor(list(item.parts.values()), dtype=torch.float64)
        told = parts @ where.moments
        scale = _scale(told, items, where) / told[:, 0]
        outside = where.misfit(
            torch.cat([told[:, :1], told[:, 1:] * scale[:, None] * told[:, :1]], 1), [item.cells for item in items]
        )
        owner = self._owners(parts @ contents[:bins], contents[bins:])
        found = [self._image(item, float(scale[row])) for row, item in enumerate(items)]
        excess = torch.tensor([rest for _, rest in found], dtype=torch.float64)
        confidence = 1 / (1 + outside + 20 * excess)
        order = _distinct([image for image, _ in found], items, confidence, most)
        empty = torch.zeros(0, self.weight.shape[1])
        images = torch.stack([found[row][0] for row in order]) if order else empty
        return Read(images=images, confidence=confidence[order], owner=owner[order])

    def _sketch(self) -> Tensor:
        """``(K, M)`` float64: every so many pixels of each row, and its bias."""
        step = max(1, self.weight.shape[1] // _SKETCH)
        return torch.cat([self.weight[:, step // 2 :: step].double(), self.bias[:, None]], 1)

    def _moments(self, bins: int) -> Tensor:
        """``(bins, 1 + directions)`` float64: of each bin the sum of weights, and of weighted projections."""
        moments = torch.zeros(bins, 1 + len(self.towards), dtype=torch.float64)
        moments[:, 0] = self.bias[:bins]
        for row in self.bias[:bins].nonzero().flatten().tolist():
            moments[row, 1:] = (self.towards @ self.weight[row]).double()
        return moments

    def _image(self, item: Item, scale: float) -> tuple[Tensor, float]:
        """One image ``(P,)`` in [0, 1], and how far it was outside, root mean square."""
        total = torch.zeros(self.weight.shape[1], dtype=torch.float64 if len(item.parts) > 1 else torch.float32)
        for cell, part in item.parts.items():
            total.add_(self.weight[cell], alpha=part * scale)
        image = total.clamp(0, 1)
        return image.float(), float((total - image).square().mean().sqrt())

    def _owners(self, sketches: Tensor, clients: Tensor) -> Tensor:
        """``(N,)`` the client whose sum each image is part of."""
        if not len(clients) or not len(sketches):
            return torch.zeros(len(sketches), dtype=torch.long)
        share: Tensor = torch.linalg.lstsq(sketches.T, clients.T, driver="gelsd").solution
        return share.argmax(1)


def _scale(told: Tensor, items: Sequence[Item], where: Where) -> Tensor:
    """``(N,)`` the factor nearest to 1 that brings each image into its own bins, where one does."""
    if not items:
        return torch.zeros(0, dtype=torch.float64)
    low, high = torch.zeros(len(items), dtype=torch.float64), torch.full((len(items),), torch.inf, dtype=torch.float64)
    for row, item in enumerate(items):
        for cell in item.cells:
            side = next(place for place, cells in enumerate(where.sides) if cell in cells)
            along = float(told[row, 1 + side] / told[row, 0])
            ends = sorted((float(where.lower[cell]) / along, float(where.upper[cell]) / along)) if along else (0.0, torch.inf)
            low[row], high[row] = max(float(low[row]), ends[0]), min(float(high[row]), ends[1])
    factor = torch.ones_like(low).clamp(low, high)
    return torch.where((low <= high) & (factor > 0.5) & (factor < 2), factor, 1.0)


def _distinct(
    images: Sequence[Tensor], items: Sequence[Item], confidence: Tensor, most: int | None, *, alike: float = 1e-3
) -> list[int]:
    """Rows by falling confidence, flat images left out; of those not told apart by their bins, one of each that look alike."""
    kept: list[int] = []
    for row in confidence.argsort(descending=True, stable=True).tolist():
        image = images[row]
        if most is not None and len(kept) == most:
            break
        if not bool(image.isfinite().all()) or float(image.std()) <= 1e-2:
            continue
        if len(items[row].cells) == 1 and any(float((image - images[other]).square().mean()) < alike for other in kept):
            continue
        kept.append(row)
    return kept


def principal_directions(images: Tensor, *, count: int) -> Tensor:
    """``(count, P)`` float32: along these, ``images`` ``(N, *shape)`` differ most; each has a standard deviation of 1."""
    flat = images.flatten(1).double()
    around = flat - flat.mean(0)
    spread, mixture = torch.linalg.eigh(around @ around.T)
    towards = mixture[:, -count:].T.flip(0) @ around
    length = spread[-count:].flip(0).clamp_min(1e-12)
    deviation: Tensor = towards / length[:, None] * len(flat) ** 0.5
    return deviation.float()
