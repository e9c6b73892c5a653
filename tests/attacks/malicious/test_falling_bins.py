from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flpriv.attacks.malicious.falling_bins import Cells, waves
from flpriv.attacks.malicious.readout import Candidates

SHAPE = (1, 16, 16)
BINS = 8


def batch(*means: float, seed: int = 0) -> Tensor:
    """One grainy image of each mean intensity, ``(N, P)`` in [0, 1]."""
    grain = torch.rand(len(means), 256, generator=torch.Generator().manual_seed(seed)) - 0.5
    return (torch.tensor(means)[:, None] + 0.2 * (grain - grain.mean(1, keepdim=True))).clamp(0, 1)


def cells(
    images: Tensor, slopes: Tensor, *, directions: int, noise: float = 0.0, level: float = 16.0, kept: float = 1.0
) -> Cells:
    """A layer after one step in which image n pulls with ``slopes[n]`` on every neuron it fires."""
    towards = waves(SHAPE, directions).float()
    reach = 1.01 * (images @ towards.T).abs().amax(0)
    start = torch.linspace(0, 1, BINS + 1)[:-1]
    edges = torch.stack([start if d == 0 else reach[d] * (2 * start - 1) for d in range(directions)])
    weight, bias = towards.repeat_interleave(BINS, 0), -edges.flatten() / level
    fired = ((images @ weight.T + level * bias) > 0).float() * slopes[:, None]
    grain = noise * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    after = kept * weight - fired.T @ images + grain
    return Cells.of((weight, bias), (after, kept * bias - level * fired.sum(0)), directions=directions, level=level, kept=kept)


def found(images: Tensor, given: Candidates, *, mse: float = 1e-5) -> list[bool]:
    return (torch.cdist(images, given.images).square() / images.shape[1]).amin(1).le(mse).tolist()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 10), (1, 4, 5, 6)])
def test_waves_begin_with_the_mean_and_stand_at_right_angles(shape: tuple[int, ...]) -> None:
    rows = waves(shape, 4)
    assert torch.allclose(rows[0], torch.full_like(rows[0], 1 / rows.shape[1]))
    overlap = rows @ rows.T
    assert torch.allclose(overlap, overlap.diag().diag(), atol=1e-12)


def test_lone_images_come_back_surest() -> None:
    images = batch(0.2, 0.45, 0.8)
    given = cells(images, torch.tensor([1e-2, -2e-2, 5e-3]), directions=1).candidates(most=None)
    assert found(images, given) == [True] * 3
    assert len(given.images) == 3
    assert given.confidence.min() > 0.9


def test_what_one_direction_mixes_others_tell_apart() -> None:
    """Four images of one mean intensity: a single direction holds only their mixture."""
    images, slopes = batch(0.45, 0.45, 0.45, 0.45), torch.tensor([1e-2, 2e-2, -1.5e-2, 3e-2])
    assert not any(found(images, cells(images, slopes, directions=1).candidates(most=None)))
    given = cells(images, slopes, directions=4).candidates(most=4)
    assert found(images, given) == [True] * 4
    assert len(given.images) == 4


def test_images_taken_out_leave_their_neighbours_alone() -> None:
    """Ten batches of eight images over eight bins: of those that are alone in no direction, many come back too."""
    shares = []
    for seed in range(10):
        rng = torch.Generator().manual_seed(seed)
        images = batch(*(0.1 + 0.8 * torch.rand(8, generator=rng)).tolist(), seed=seed)
        slopes = 1e-2 * torch.randn(8, generator=rng)
        shares.append([sum(found(images, cells(images, slopes, directions=d).candidates(most=8))) / 8 for d in (1, 2, 4)])
    one, two, four = torch.tensor(shares).mean(0).tolist()
    assert one < 0.5 < two < four
    assert four >= 0.9


def test_empty_cells_give_nothing() -> None:
    assert cells(batch(0.5), torch.zeros(1), directions=2).candidates(most=None).images.shape == (0, 256)


def test_weight_decay_is_taken_out() -> None:
    images = batch(0.2, 0.8)
    given = cells(images, torch.tensor([1e-2, -1e-2]), directions=2, kept=0.95).candidates(most=2)
    assert found(images, given) == [True, True]


def test_noise_lowers_confidence_and_is_no_image() -> None:
    images, slopes = batch(0.2, 0.8), torch.tensor([1e-2, -1e-2])
    clear = cells(images, slopes, directions=2).candidates(most=2)
    noisy = cells(images, slopes, directions=2, noise=1e-1).candidates(most=2)
    assert len(noisy.images) == 2
    assert noisy.confidence.max() < clear.confidence.min()
    assert not any(found(images, noisy, mse=1e-2))


def test_no_more_than_there_were() -> None:
    images, slopes = batch(0.2, 0.45, 0.8), torch.tensor([1e-2, 1e-2, 1e-2])
    given = cells(images, slopes, directions=4).candidates(most=2)
    assert len(given.images) == 2
    assert given.confidence.tolist() == sorted(given.confidence.tolist(), reverse=True)
