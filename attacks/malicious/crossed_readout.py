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
        where = Where(moments=self._moments, lower=self.lower[:bins], upper=self.upper[:bins], sides=sides)
        contents = self._sketch()
        items = untangle(contents[:bins], where, most=most)
        parts = torch.zeros(len(items), bins, dtype=torch.float64)
        for row, item in enumerate(items):
            parts[row, list(item.parts)] = torch.tensor(list(item.parts.values()), dtype=torch.float64)
        told, cells = self._moments(parts), [item.cells for item in items]
        factor = _factor(*where.along(told, cells)) if items else torch.zeros(0)
        told[:, 1:] *= factor[:, None]
        outside = where.misfit(told, cells)
        scale = factor / told[:, 0]
        seen = parts @ contents[:bins]
        raw = seen[:, :-1] * scale[:, None]
        excess = (raw - raw.clamp(0, 1)).square().mean(1).sqrt()
        confidence = 1 / (1 + outside + 20 * excess)
        order = _distinct(raw.clamp(0, 1), items, confidence, most)
        images = torch.empty(len(order), self.weight.shape[1])
        for place, row in enumerate(order):
            self._image(items[row], float(scale[row]), out=images[place])
        return Read(images=images, confidence=confidence[order], owner=self._owners(seen, contents[bins:])[order])

    def _sketch(self) -> Tensor:
        """``(K, M)`` float64: every so many pixels of each row that is not empty, and its bias."""
        step = max(1, self.weight.shape[1] // _SKETCH)
        columns = range(step // 2, self.weight.shape[1], step)
        sketch = torch.zeros(len(self.bias), len(columns) + 1, dtype=torch.float64)
        sketch[:, -1] = self.bias
        busy = self.bias.nonzero().flatten()
        sketch[busy, :-1] = self.weight[:, columns.start :: step][busy].double()
        return sketch

    def _moments(self, shares: Tensor) -> Tensor:
        """``(N, 1 + directions)`` float64 of shares ``(N, bins)`` in the bins: sums of weights, and of weighted projections."""
        moments = torch.zeros(shares.shape[1], 1 + len(self.towards), dtype=torch.float64)
        for row in shares.any(0).nonzero().flatten().tolist():
            moments[row, 0], moments[row, 1:] = self.bias[row], self.towards @ self.weight[row]
        return shares @ moments

    def _image(self, item: Item, scale: float, *, out: Tensor) -> None:
        """Write one image ``(P,)`` in [0, 1] to ``out``."""
        if len(item.parts) == 1:
            ((cell, part),) = item.parts.items()
            torch.mul(self.weight[cell], part * scale, out=out)
        else:
            total = torch.zeros(len(out), dtype=torch.float64)
            for cell, part in item.parts.items():
                total.add_(self.weight[cell], alpha=part * scale)
            out.copy_(total)
        out.clamp_(0, 1)

    def _owners(self, sketches: Tensor, clients: Tensor) -> Tensor:
        """``(N,)`` the client whose sum each image is part of."""
        if not len(clients) or not len(sketches):
            return torch.zeros(len(sketches), dtype=torch.long)
        share: Tensor = torch.linalg.lstsq(sketches.T, clients.T, driver="gelsd").solution
        return share.argmax(1)


def _factor(found: Tensor, lower: Tensor, upper: Tensor) -> Tensor:
    """``(N,)`` the factor nearest to 1 that brings images from ``found`` ``(N, n)`` between all their edges, where one does."""
    ends = torch.stack([lower / found, upper / found])
    low, high = ends.amin(0).amax(1), ends.amax(0).amin(1)
    factor = torch.ones_like(low).clamp(low, high)
    return torch.where((low <= high) & (factor > 0.5) & (factor < 2), factor, 1.0)


def _distinct(images: Tensor, items: Sequence[Item], confidence: Tensor, most: int | None, *, alike: float = 1e-3) -> list[int]:
    """Rows by falling confidence, flat images left out; of those not told apart by their bins, one of each that look alike."""
    kept: list[int] = []
    fit = images.isfinite().all(1) & (images.std(1, correction=0) > 1e-2)
    for row in confidence.argsort(descending=True, stable=True).tolist():
        image = images[row]
        if most is not None and len(kept) == most:
            break
        if not fit[row]:
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
