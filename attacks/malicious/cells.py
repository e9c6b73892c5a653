"""Cells: sums of a few images each, seen from several sides, taken apart into single images.

Every image adds the same vector to exactly one cell of each side. Which cells go together follows from linear algebra alone: the
indicator of an image's cells lies in the span of what the cells hold (the idea of MUSIC, Schmidt 1986), and those of no image do
not. Images that are then alone in some cell are taken out of all others, until none is left.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Cells = tuple[int, ...]
"""One cell of each side."""

_KEPT = 20_000
"""Combinations of cells that are looked at more closely, at most."""


@dataclass(frozen=True, kw_only=True)
class Item:
    """One image, or images that share all their cells.

    Args:
        cells: the cells it is in, one of each side; where it was not told apart, the one it was read from.
        parts: cell to coefficient: the sum of contents that is its own.
    """

    cells: Cells
    parts: dict[int, float]


@dataclass(frozen=True, kw_only=True)
class Where:
    """Where the images of each cell must lie.

    Args:
        moments: from shares ``(N, K)`` in what the cells hold to ``(N, 1 + sides)`` float64: the sum of its images' weights, and
            of their weighted projections.
        lower: ``(K,)`` edge of each cell.
        upper: ``(K,)`` the other edge.
        sides: the cells of each side.
    """

    moments: Callable[[Tensor], Tensor]
    lower: Tensor
    upper: Tensor
    sides: tuple[range, ...]

    def misfit(self, told: Tensor, cells: Sequence[Cells] | Tensor) -> Tensor:
        """``(N,)`` how far images with moments ``told`` lie outside their cells, in widths; at most 1 for each cell."""
        if not len(cells):
            return torch.zeros(0, dtype=told.dtype)
        found, lower, upper = self.along(told, cells)
        outside = torch.maximum(lower - found, found - upper).clamp_min(0) / (upper - lower)
        return outside.nan_to_num(1.0).clamp_max(1).sum(1)

    def along(self, told: Tensor, cells: Sequence[Cells] | Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``(N, n)`` each: where images with moments ``told`` lie along the direction of each of their cells, and its edges."""
        rows = torch.as_tensor(cells)
        side = torch.zeros_like(rows)
        for place, own in enumerate(self.sides):
            side[(rows >= own.start) & (rows < own.stop)] = place
        return told.gather(1, 1 + side) / told[:, :1], self.lower[rows], self.upper[rows]


def untangle(contents: Tensor, where: Where, *, most: int | None, rounding: float = 2e-7) -> list[Item]:
    """The images behind cells, those first that stood alone; none where there are too many to tell them apart.

    Args:
        contents: ``(K, M)`` float64, a part of what each cell holds; more columns than images.
        where: where the images of each cell must lie; one to three sides.
        most: no more images than this, where it is known; tells noise from content.
        rounding: relative error of each cell.
    """
    size = contents.norm(dim=1)
    noise = _noise(size, where.sides, most)
    busy = _busy(size, noise, where.sides)
    if len(where.sides) == 1 or not all(busy):
        return []
    found = _together(contents, busy, (noise + rounding * size).clamp_min(1e-300))
    return _peel(contents, found, where, noise=noise, rounding=rounding)


def one_by_one(contents: Tensor, where: Where, *, most: int | None) -> list[Item]:
    """Each cell that is not empty, as if one image alone were in it; arguments as those of :func:`untangle`."""
    size = contents.norm(dim=1)
    busy = _busy(size, _noise(size, where.sides, most), where.sides)
    return [Item(cells=(cell,), parts={cell: 1.0}) for side in busy for cell in side]


def _busy(size: Tensor, noise: Tensor, sides: Sequence[range]) -> list[list[int]]:
    return [[cell for cell in side if float(size[cell]) > 3 * float(noise[cell])] for side in sides]


def _noise(size: Tensor, sides: Sequence[range], most: int | None) -> Tensor:
    """How much an empty cell holds at most: nothing where some hold nothing, else the fullest of those that must be empty."""
    noise = torch.zeros_like(size)
    for side in sides:
        own = size[side.start : side.stop]
        if most is not None and most < len(own) and bool((own > 0).all()):
            noise[side.start : side.stop] = own.sort().values[len(own) - most - 1]
    return noise


def _together(contents: Tensor, busy: Sequence[Sequence[int]], noise: Tensor) -> list[Cells]:
    """Combinations of one cell of each side that could be an image's, surest first; none where there are too many images."""
    rows = torch.tensor([cell for side in busy for cell in side])
    scale = 1 / noise[rows]
    clean = contents[rows] * scale[:, None]
    left, values, _ = torch.linalg.svd(torch.linalg.qr(clean.T).R.T)
    rank = int((values > 2).sum())
    if rank >= len(rows) - len(busy) + 1:
        return []
    inside = left[:, :rank]
    apart = (torch.eye(len(rows), dtype=clean.dtype) - inside @ inside.T) * scale[:, None] * scale
    scores, places = _scores(apart, scale.square(), [len(side) for side in busy])
    chosen = _independent(scores, places, inside, scale, rank)
    return [tuple(int(rows[place]) for place in places[index]) for index in chosen]


def _scores(apart: Tensor, weight: Tensor, sizes: Sequence[int]) -> tuple[Tensor, Tensor]:
    """How far the best combinations lie outside the span, rising, and their places ``(N, sides)``.

    Args:
        apart: ``(n, n)`` the projection off the span, both sides scaled.
        weight: ``(n,)`` squared scales.
        sizes: busy cells of each side.
    """
    first, second = range(sizes[0]), slice(sizes[0], sizes[0] + sizes[1])
    third = slice(second.stop, second.stop + sizes[2]) if len(sizes) == 3 else None
    diagonal = apart.diagonal()
    found: list[tuple[Tensor, Tensor]] = []
    for one in first:
        off = diagonal[one] + diagonal[second] + 2 * apart[one, second]
        whole = weight[one] + weight[second]
        if third is not None:
            off = off[:, None] + diagonal[third] + 2 * (apart[one, third] + apart[second, third])
            whole = whole[:, None] + weight[third]
        score = (off / whole).clamp_min(0).sqrt()
        near = (score < 0.3).nonzero()
        places = torch.cat([torch.full((len(near), 1), one), near + torch.tensor([s.start for s in (second, third) if s])], 1)
        found.append((score[score < 0.3], places))
    scores = torch.cat([score for score, _ in found])
    order = scores.argsort(stable=True)[:_KEPT]
    return scores[order], torch.cat([places for _, places in found])[order]


def _independent(scores: Tensor, places: Tensor, inside: Tensor, scale: Tensor, rank: int) -> range:
    """The surest combinations: until ``rank`` of them are independent, and all that are hardly less sure."""
    basis, size, last = torch.zeros(rank, rank, dtype=inside.dtype), 0, 0
    for index in range(min(len(scores), 4 * rank)):
        vector = (inside[places[index]] * scale[places[index], None]).sum(0)
        vector = vector / vector.norm().clamp_min(1e-300)
        for _ in range(2):
            vector = vector - (basis[:size] @ vector) @ basis[:size]
        if float(vector.norm()) > 1e-6:
            basis[size], size, last = vector / vector.norm(), size + 1, index
        if size == rank:
            break
    if not len(scores):
        return range(0)
    limit = 3 * max(float(scores[last]), 1e-9)
    return range(min(int((scores <= limit).sum()), 4 * rank))


def _peel(contents: Tensor, found: Sequence[Cells], where: Where, *, noise: Tensor, rounding: float) -> list[Item]:
    """Take out what is alone in a cell, again and again; a combination one of whose cells is empty by then was none."""
    rest, left = contents.clone(), contents.norm(dim=1).tolist()
    size, empty = list(left), (3 * noise + 50 * rounding * contents.norm(dim=1)).tolist()
    made = torch.eye(len(contents), dtype=contents.dtype)
    alive = set(range(len(found)))
    within: dict[int, set[int]] = {}
    for index, cells in enumerate(found):
        for cell in cells:
            within.setdefault(cell, set()).add(index)
    items: list[Item] = []

    def remove(indices: Iterable[int]) -> None:
        for index in tuple(indices):
            alive.discard(index)
            for cell in found[index]:
                within[cell].discard(index)

    while lone := [cell for cell, inside in within.items() if len(inside) == 1]:
        clearest = max(lone, key=lambda cell: left[cell] / size[cell])
        (index,) = within[clearest]
        own, parts = rest[clearest].clone(), made[clearest].clone()
        remove([index])
        items.append(_item(found[index], parts))
        for cell in found[index]:
            rest[cell] -= own
            made[cell] -= parts
            left[cell] = float(rest[cell].norm())
            if left[cell] <= empty[cell]:
                remove(within[cell])
    return [*items, *_knot([found[index] for index in sorted(alive)], made, where)]


def _knot(found: Sequence[Cells], made: Tensor, where: Where) -> list[Item]:
    """Least squares over what no cell holds alone.

    Where more combinations are in the span than it has dimensions, the ones are chosen whose images lie in their own cells, by
    exchanging one for another as long as that brings more of them home.
    """
    if not found:
        return []
    cells = sorted({cell for one in found for cell in one})
    place = {cell: row for row, cell in enumerate(cells)}
    pattern = torch.zeros(len(cells), len(found), dtype=made.dtype)
    for column, one in enumerate(found):
        pattern[[place[cell] for cell in one], column] = 1
    chosen = _basis(pattern)
    coordinates = torch.linalg.pinv(pattern[:, chosen], rtol=1e-9)
    shares = coordinates @ made[cells]
    spare = [column for column in range(len(found)) if column not in set(chosen)]
    within = (coordinates @ pattern[:, spare]).round(decimals=6)
    told = where.moments(shares) if spare else shares
    places = torch.tensor(found)
    while spare:
        misfit = where.misfit(told, places[chosen])
        gains = [
            _best_exchange(told, misfit, within[:, new], places[chosen], places[one], where) for new, one in enumerate(spare)
        ]
        new = min(range(len(spare)), key=lambda place: gains[place][0])
        gain, old = gains[new]
        if gain > -0.5:
            break
        along = within[:, new].clone()
        told, shares = _exchange(told, along, old), _exchange(shares, along, old)
        leaving = torch.zeros(len(chosen), dtype=within.dtype)
        leaving[old] = 1
        within[:, new] = leaving
        within = _exchange(within, along, old).round(decimals=6)
        chosen[old], spare[new] = spare[new], chosen[old]
    return [_item(found[column], shares[row]) for row, column in enumerate(chosen)]


def _best_exchange(told: Tensor, misfit: Tensor, along: Tensor, chosen: Tensor, new: Tensor, where: Where) -> tuple[float, int]:
    """By how much the misfit of all falls, and whose place the combination ``new`` then takes, at best.

    Args:
        told: ``(N, m)`` moments of the chosen.
        misfit: ``(N,)`` of the chosen.
        along: ``(N,)`` coordinates of the new one among them.
        chosen: ``(N, sides)`` their cells.
        new: ``(sides,)`` its cells.
        where: where images must lie.
    """
    rows = (along.abs() > 1e-3).nonzero().flatten()
    if not len(rows):
        return 0.0, 0
    own = told[rows] / along[rows, None]
    moved = told[rows] - along[rows, None] * own[:, None]
    cells = chosen[rows].repeat(len(rows), 1, 1)
    each = torch.arange(len(rows))
    moved[each, each], cells[each, each] = own, new
    after = where.misfit(moved.flatten(0, 1), cells.flatten(0, 1)).view(len(rows), -1).sum(1)
    best = int(after.argmin())
    return float(after[best] - misfit[rows].sum()), int(rows[best])


def _exchange(values: Tensor, along: Tensor, old: int) -> Tensor:
    """Values in a basis in which the vector with coordinates ``along`` has taken the place of the one at ``old``."""
    own = values[old] / along[old]
    moved = values - along[:, None] * own
    moved[old] = own
    return moved


def _basis(pattern: Tensor) -> list[int]:
    """Columns that span all, by elimination with pivots."""
    rest, chosen = pattern.clone(), []
    for _ in range(min(pattern.shape)):
        size = rest.norm(dim=0)
        best = int(size.argmax())
        if float(size[best]) < 1e-6:
            break
        unit = rest[:, best] / size[best]
        rest = rest - unit[:, None] * (unit @ rest)
        chosen.append(best)
    return chosen


def _item(cells: Cells, parts: Tensor) -> Item:
    return Item(cells=cells, parts={int(cell): float(parts[cell]) for cell in (parts.abs() > 1e-9).nonzero().flatten()})
