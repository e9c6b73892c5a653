"""Cells are taken apart exactly, whatever shares them, and nothing is made up where that cannot be."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from flpriv.attacks.malicious.cells import Item, Where, one_by_one, untangle

WIDE = 400


def world(images: int, *, sides: int, per: int, seed: int, noise: float = 0.0) -> tuple[Tensor, Where, Tensor, Tensor]:
    """Contents, bounds, the weighted images ``(N, WIDE + 1)`` and the cells of each ``(N, sides)``."""
    rng = torch.Generator().manual_seed(seed)
    places = torch.rand(images, sides, generator=rng, dtype=torch.float64) * per
    cells = places.floor().long() + torch.arange(sides) * per
    weights = torch.randn(images, 1, generator=rng, dtype=torch.float64)
    own = weights * torch.cat([torch.rand(images, WIDE, generator=rng, dtype=torch.float64), torch.ones(images, 1)], 1)
    contents, moments = torch.zeros(sides * per, WIDE + 1), torch.zeros(sides * per, 1 + sides)
    contents, moments = contents.double(), moments.double()
    told = weights * torch.cat([torch.ones(images, 1), places], 1)
    for side in range(sides):
        contents.index_add_(0, cells[:, side], own)
        moments.index_add_(0, cells[:, side], told)
    if noise:
        contents += noise * torch.randn(contents.shape, generator=rng, dtype=torch.float64)
    edges = torch.arange(per, dtype=torch.float64).repeat(sides)
    bounds = tuple(range(side * per, (side + 1) * per) for side in range(sides))
    return contents, Where(moments=lambda shares: shares @ moments, lower=edges, upper=edges + 1, sides=bounds), own, cells


def rebuilt(items: list[Item], contents: Tensor) -> Tensor:
    return torch.stack(
        [sum((part * contents[cell] for cell, part in item.parts.items()), torch.zeros(WIDE + 1)) for item in items]
    )


@pytest.mark.parametrize(("images", "sides", "per"), [(40, 2, 100), (64, 2, 256), (64, 3, 170), (192, 3, 170), (256, 3, 170)])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_image_is_found_with_its_cells(images: int, sides: int, per: int, seed: int) -> None:
    contents, where, own, cells = world(images, sides=sides, per=per, seed=seed)
    items = untangle(contents, where, most=images)
    distinct = {tuple(row): sum(1 for other in cells.tolist() if other == row) for row in cells.tolist()}
    found = {item.cells for item in items}
    assert len(found & distinct.keys()) >= 0.98 * len(distinct)
    assert len(items) <= len(distinct) + 2
    made = rebuilt(items, contents)
    lone = [row for row, place in enumerate(map(tuple, cells.tolist())) if distinct[place] == 1]
    nearest = torch.cdist(own[lone], made).amin(1) / own[lone].norm(dim=1)
    assert float((nearest < 1e-6).double().mean()) >= 0.98


def test_a_cell_shared_on_every_side_is_no_obstacle() -> None:
    """Three images of which no one is alone on more than one side."""
    _, where, own, _ = world(3, sides=3, per=4, seed=0)
    contents, moments = torch.zeros(12, WIDE + 1).double(), torch.zeros(12, 4).double()
    places = [(0, 4, 8), (0, 5, 9), (1, 4, 9)]
    for image, place in enumerate(places):
        for side, cell in enumerate(place):
            contents[cell] += own[image]
            moments[cell, 0] += own[image, -1]
            moments[cell, 1 + side] += own[image, -1] * (cell % 4 + 0.5)
    where = replace(where, moments=lambda shares: shares @ moments)
    items = untangle(contents, where, most=3)
    assert sorted(item.cells for item in items) == sorted(places)
    assert torch.cdist(own, rebuilt(items, contents)).amin(1).max() < 1e-9


def test_empty_cells_hold_nothing() -> None:
    contents, where, _, _ = world(0, sides=3, per=5, seed=0)
    assert untangle(contents, where, most=5) == []


def test_a_little_noise_is_borne_and_makes_nothing_up() -> None:
    contents, where, own, _ = world(40, sides=3, per=170, seed=3, noise=1e-4)
    items = untangle(contents, where, most=40)
    assert len(items) <= 44
    made = rebuilt(items, contents)
    assert float((torch.cdist(own, made).amin(1) / own.norm(dim=1) < 0.05).double().mean()) >= 0.8


def test_with_more_images_than_cells_nothing_is_told_apart_and_each_cell_stands_for_itself() -> None:
    contents, where, _, _ = world(120, sides=3, per=12, seed=0)
    assert untangle(contents, where, most=120) == []
    items = one_by_one(contents, where, most=120)
    assert {len(item.cells) for item in items} == {1}
    assert {item.cells[0] for item in items} == set(contents.norm(dim=1).nonzero().flatten().tolist())


def test_where_an_image_lies_is_measured_in_widths() -> None:
    _, where, _, _ = world(0, sides=2, per=3, seed=0)
    told = torch.tensor([[2.0, 2 * 1.5, 2 * 0.5], [1.0, 1.5, 2.5], [1.0, 9.0, 1.25]], dtype=torch.float64)
    assert where.misfit(told, [(1, 3), (1, 3), (1, 3)]).tolist() == [0.0, 1.0, 1.25]
    assert where.misfit(told, [(3,), (4,), (4,)]).tolist() == [0.0, 0.5, 0.0]
    assert where.misfit(told, []).tolist() == []
