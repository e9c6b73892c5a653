from __future__ import annotations

import pytest
import torch

from flpriv.attacks.inversion.regularisers import agreement, near, squared_norm


@pytest.mark.parametrize("shape", [(2, 1, 4, 6), (1, 3, 4, 5, 6)])
def test_distances_to_black_and_to_a_prior_image(shape: tuple[int, ...]) -> None:
    images = torch.full(shape, 0.4)
    assert squared_norm(images).item() == pytest.approx(0.16)
    assert near(torch.full(shape[1:], 0.1))(images).item() == pytest.approx(0.09)
    assert near(images[0])(images).item() == 0


def shuffled(labels: torch.Tensor, *, noise: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Two updates of three images, each found by four restarts in orders of their own: true images, trials, labels."""
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand((2, 1, 3, 1, 6, 5), generator=rng).expand(2, 4, 3, 1, 6, 5)
    orders = torch.stack([torch.randperm(3, generator=rng) for _ in range(8)]).view(2, 4, 3)
    picked = torch.stack([truth[u, r][orders[u, r]] for u in range(2) for r in range(4)])
    trials = picked + noise * torch.randn(picked.shape, generator=rng)
    return picked, trials, torch.stack([labels[order] for order in orders.view(8, 3)])


@pytest.mark.parametrize("labels", [[0, 0, 0], [0, 1, 0], [2, 0, 1]])
def test_restarts_agree_patient_by_patient_in_whatever_order_they_hold_them(labels: list[int]) -> None:
    truth, trials, given = shuffled(torch.tensor(labels), noise=0.05)
    agreed = agreement(trials, given, restarts=4)
    assert agreed.shape == trials.shape
    assert (agreed - truth).square().mean() < 0.4 * (trials - truth).square().mean()


def test_images_of_other_labels_are_never_mixed() -> None:
    _, trials, _ = shuffled(torch.tensor([0, 1, 2]), noise=0.0)
    labels = torch.stack([torch.randperm(3, generator=torch.Generator().manual_seed(seed)) for seed in range(8)])
    agreed = agreement(trials, labels, restarts=4)
    for update in (slice(0, 4), slice(4, 8)):
        for label in range(3):
            expected = trials[update][labels[update] == label].mean(0)
            assert torch.allclose(agreed[update][labels[update] == label], expected.expand(4, 1, 6, 5), atol=1e-6)


def test_single_images_agree_on_their_mean_and_single_restarts_on_themselves() -> None:
    images = torch.rand((6, 1, 1, 4, 4), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros((6, 1), dtype=torch.long)
    assert torch.allclose(agreement(images, labels, restarts=3)[:3], images[:3].mean(0).expand(3, 1, 1, 4, 4))
    batch = images.view(2, 3, 1, 4, 4)
    assert torch.equal(agreement(batch, torch.zeros((2, 3), dtype=torch.long), restarts=1), batch)
