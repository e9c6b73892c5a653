"""Images out of the update of a crossed layer, and how far to believe each; nothing here looks at the truth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flpriv.attacks.malicious.cells import Item, Where, one_by_one, untangle

_SKETCH = 1024
"""Pixels by which images are told apart; the images themselves are put together from all."""
_ROUNDINGS = (2e-7, 1e-3)
"""Relative errors of an update, those of float32 and of half precision."""


@dataclass(frozen=True, kw_only=True)
class Read:
    """Images that may be records, the surest first.

    Args:
        images: ``(N, P)`` float32.
        confidence: ``(N,)`` float64 in (0, 1]; 1 for an image that lies in the box and in its own bins of all directions.
        owner: ``(N,)`` which client's neuron tells of each, 0 where clients are not told apart.
        method: how they were found, in words.
    """

    images: Tensor
    confidence: Tensor
    owner: Tensor
    method: str


@dataclass(frozen=True, kw_only=True)
class _Guess:
    """One way to take the cells apart: images, the factor that makes each one of its cells' contents, and the order to offer."""

    items: Sequence[Item]
    scale: Tensor
    confidence: Tensor
    order: list[int]

    @property
    def believed(self) -> float:
        """How many images are believed, each as far as it is."""
        return float(self.confidence[self.order].square().sum())

    @property
    def sure(self) -> bool:
        return bool(self.order) and self.believed > 0.9 * len(self.items)


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

    def read(self, *, most: int | None, pixels: bool = True) -> Read:
        """All images the layer tells of, at most ``most``. A row of ``weight`` is looked at only where its bin is not empty.

        Args:
            most: no more images than this.
            pixels: whether values must lie in [0, 1]; those inside a network need not.
        """
        bins = len(self.bias) - self.clients
        per = bins // len(self.towards)
        sides = tuple(range(start, start + per) for start in range(0, bins, per))
        where = Where(moments=self._moments, lower=self.lower[:bins], upper=self.upper[:bins], sides=sides)
        contents = self._sketch()
        best = _Guess(items=[], scale=torch.zeros(0), confidence=torch.zeros(0, dtype=torch.float64), order=[])
        for rounding in (*_ROUNDINGS, None):
            if rounding is None:
                items = _alike(one_by_one(contents[:bins], where, most=most), contents)
            else:
                items = untangle(contents[:bins], where, most=most, rounding=rounding)
            guess = self._guess(items, where, contents, most, pixels)
            if guess.believed > best.believed:
                best = guess
            if best.sure:
                break
        images = torch.empty(len(best.order), self.weight.shape[1])
        for place, row in enumerate(best.order):
            self._image(best.items[row], float(best.scale[row]), out=images[place])
        if pixels:
            images.clamp_(0, 1)
        seen = _parts(best.items, bins) @ contents[:bins]
        owner = self._owners(seen, contents[bins:])
        method = "crossed bins" if all(len(item.cells) == len(sides) for item in best.items) else "bins one by one"
        return Read(images=images, confidence=best.confidence[best.order], owner=owner[best.order], method=method)

    def _guess(self, items: Sequence[Item], where: Where, contents: Tensor, most: int | None, pixels: bool) -> _Guess:
        """How far ``items`` are to be believed, by what ``contents`` tell of them."""
        if not items:
            return _Guess(items=[], scale=torch.zeros(0), confidence=torch.zeros(0, dtype=torch.float64), order=[])
        parts, cells = _parts(items, len(where.lower)), [item.cells for item in items]
        told = self._moments(parts)
        factor = torch.where(where.misfit(told, cells) > 0.1, _factor(*where.along(told, cells)), 1.0)
        told[:, 1:] *= factor[:, None]
        scale = factor / told[:, 0]
        raw = (parts @ contents[: len(where.lower), :-1]) * scale[:, None]
        excess = (raw - raw.clamp(0, 1)).square().mean(1).sqrt() * pixels
        borne_out = torch.tensor(
            [max(len(item.cells), len(item.parts)) / len(where.sides) for item in items], dtype=torch.float64
        )
        confidence = borne_out.clamp_max(1) / (1 + where.misfit(told, cells) + 20 * excess)
        confidence = confidence.nan_to_num(0.0)
        fit = raw.isfinite().all(1) & ((raw.clamp(0, 1) if pixels else raw).std(1, correction=0) > (1e-2 if pixels else 0))
        order = [row for row in confidence.argsort(descending=True, stable=True).tolist() if fit[row]][:most]
        return _Guess(items=items, scale=scale, confidence=confidence, order=order)

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
        """Write one image ``(P,)`` to ``out``."""
        if len(item.parts) == 1:
            ((cell, part),) = item.parts.items()
            torch.mul(self.weight[cell], part * scale, out=out)
        else:
            total = torch.zeros(len(out), dtype=torch.float64)
            for cell, part in item.parts.items():
                total.add_(self.weight[cell], alpha=part * scale)
            out.copy_(total)

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


def _parts(items: Sequence[Item], cells: int) -> Tensor:
    """``(N, cells)`` float64 what each item is made of."""
    parts = torch.zeros(len(items), cells, dtype=torch.float64)
    for row, item in enumerate(items):
        parts[row, list(item.parts)] = torch.tensor(list(item.parts.values()), dtype=torch.float64)
    return parts


def _alike(items: Sequence[Item], contents: Tensor, *, alike: float = 4e-3) -> list[Item]:
    """Single cells, those that show the same image (mean square below ``alike``) added up: noise that they do not share fades."""
    rows = torch.tensor([item.cells[0] for item in items], dtype=torch.long)
    pull = contents[rows, -1]
    images = contents[rows, :-1] / pull[:, None]
    groups: list[list[int]] = []
    for row in pull.abs().argsort(descending=True).tolist():
        near = next((group for group in groups if float((images[row] - images[group[0]]).square().mean()) < alike), None)
        if near is None:
            groups.append([row])
        else:
            near.append(row)
    return [replace(items[group[0]], parts={items[row].cells[0]: 1.0 for row in group}) for group in groups]


def mixed_directions(images: Tensor, *, count: int, rng: torch.Generator) -> Tensor:
    """``(count, P)`` float32: uncorrelated mixtures of the principal directions of ``images`` ``(N, *shape)``, deviation 1 each.

    Single ones may part groups of images (patients, devices) rather than images; the more are mixed, the more evenly images lie.
    """
    components = principal_directions(images, count=max(count, min(4 * count, len(images) // 12)))
    mixture = torch.linalg.qr(torch.randn(len(components), count, generator=rng)).Q
    mixed: Tensor = mixture.T @ components
    return mixed


def principal_directions(images: Tensor, *, count: int) -> Tensor:
    """``(count, P)`` float32: along these, ``images`` ``(N, *shape)`` differ most; each has a standard deviation of 1."""
    flat = images.flatten(1).double()
    around = flat - flat.mean(0)
    spread, mixture = torch.linalg.eigh(around @ around.T)
    towards = mixture[:, -count:].T.flip(0) @ around
    length = spread[-count:].flip(0).clamp_min(1e-12)
    deviation: Tensor = towards / length[:, None] * len(flat) ** 0.5
    return deviation.float()
