from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate

from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.plan import Plan
from flpriv.attacks.inversion.restoration import Degradation, Restoration, Restorer
from flpriv.attacks.inversion.search import Adam
from flpriv.attacks.inversion.simulation import Pairs
from flpriv.capture import Capture
from flpriv.errors import FlprivError
from flpriv.measures.images import mse, psnr
from flpriv.records import Records

Make = Callable[..., Any]
SHORT = Restoration(updates=2, steps=3, batch=2)
PLAN = Plan(optimiser=Adam(), iterations=3)


def worse(images: Tensor, *, seed: int) -> Tensor:
    """Blurred by a half of the size, and noisy."""
    small = interpolate(avg_pool2d(images, 2), scale_factor=2, mode="bilinear")
    return (small + 0.05 * torch.randn(images.shape, generator=torch.Generator().manual_seed(seed))).clamp(0, 1)


def pairs(images: Tensor, *, seed: int = 0) -> Pairs:
    return Pairs(found=worse(images, seed=seed), images=images, mismatch=torch.zeros(len(images)))


def quality(found: Tensor, images: Tensor) -> float:
    return float(psnr(mse(found, images)).mean())


def evidence(capture: Capture, *, seed: int = 0) -> Evidence:
    rng = torch.Generator().manual_seed(seed)
    device = torch.device("cpu")
    return gather(capture, capture.observations[0], rng=rng, device=device, max_steps=16, max_images=64, who="test")


def restored(training: Restoration, capture: Capture, *, seed: int = 0) -> dict[str, Tensor]:
    net = training.of(PLAN, evidence(capture), capture, key={"plan": "test"}, seed=seed)
    return dict(net.state_dict())


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[key], other[key]) for key in one)


def learned(training: Restoration, known: Pairs, public: Tensor) -> Restorer:
    net = training.build(tuple(public.shape[1:]), seed=0)
    net.load_state_dict(training.learn(known, public, seed=0))
    return net.requires_grad_(False)


def test_unseen_xrays_come_back_better(xrays: Any) -> None:
    """What a coarse search leaves out is partly known from other patients: by a linear filter, and more by the network."""
    public, unseen = xrays.public.images, xrays.private.images[:32]
    net = learned(Restoration(steps=80, side=32), pairs(public[:16]), public)
    bad = worse(unseen, seed=5)
    assert quality(net.filtered(bad), unseen) >= quality(bad, unseen) + 3
    assert quality(net(bad), unseen) >= quality(net.filtered(bad), unseen) + 0.3


@pytest.mark.parametrize("shape", [(1, 30, 37), (3, 16, 21), (1, 9, 12, 14), (3, 8, 10, 6)])
def test_any_size_two_or_three_axes_and_untrained_it_changes_nothing(shape: tuple[int, ...]) -> None:
    net = Restoration().build(shape, seed=0)
    images = torch.rand(2, *shape)
    assert torch.allclose(net(images), images, atol=1e-5)
    assert sum(weights.numel() for weights in net.parameters()) < 300_000
    found = torch.rand(3, *shape)
    weights = SHORT.learn(Pairs(found=found, images=1 - found, mismatch=torch.zeros(3)), torch.rand(2, *shape), seed=0)
    net.load_state_dict(weights)
    assert net(images).shape == images.shape and not torch.allclose(net(images), images, atol=1e-3)


def test_the_degradation_of_public_images_is_that_of_the_pairs(smooth: Make) -> None:
    images, others = (smooth(64, (1, 32, 32), seed=seed).images * 0.8 + 0.1 for seed in (0, 1))
    degraded = Degradation.of(pairs(images))(others, rng=torch.Generator().manual_seed(0))
    error, expected = mse(degraded, others).mean(), mse(worse(others, seed=7), others).mean()
    assert float(error) == pytest.approx(float(expected), rel=0.2)


def test_weights_follow_from_the_seed_alone(
    federate: Make, smooth: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    capture = federate(smooth(1), public=smooth(4, seed=8)).capture
    one = restored(SHORT, capture)
    monkeypatch.setenv("FLPRIV_CACHE", str(tmp_path / "another"))
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    assert same(one, restored(SHORT, capture))
    assert torch.equal(before, torch.random.get_rng_state())
    assert not same(one, restored(SHORT, capture, seed=1))


def test_what_was_learned_is_kept_and_only_for_the_like(federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    public = smooth(4, seed=8)
    capture = federate(smooth(1), public=public).capture
    first = restored(SHORT, capture)
    another_patient = federate(smooth(1, seed=5), public=public).capture
    trained: list[int] = []
    learn = Restoration.learn

    def counted(self: Restoration, *args: Any, **options: Any) -> Any:
        trained.append(1)
        return learn(self, *args, **options)

    monkeypatch.setattr(Restoration, "learn", counted)
    assert same(first, restored(SHORT, capture)) and same(first, restored(SHORT, another_patient))
    assert not trained, "what is kept is used again, and does not depend on the update"
    (seen,) = capture.observations
    protected = replace(capture, observations=(replace(seen, defenses=(("sign-sgd", {}),)),))
    others = replace(capture, public=smooth(4, seed=9))
    for different in (protected, others, federate(smooth(1), public=public, seed=1).capture):
        restored(SHORT, different)
    restored(replace(SHORT, steps=4), capture)
    assert len(trained) == 4


def test_it_learns_from_public_images_alone(federate: Make, smooth: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    capture = federate(smooth(1), public=smooth(4, seed=8)).capture
    taught: list[Tensor] = []
    learn = Restoration.learn

    def overheard(self: Restoration, known: Pairs, public: Tensor, *, seed: int) -> Any:
        taught.extend([*known.images, *public])
        return learn(self, known, public, seed=seed)

    monkeypatch.setattr(Restoration, "learn", overheard)
    restored(SHORT, replace(capture, candidates=smooth(3, seed=2), exposed=smooth(3, seed=3)))
    public = capture.public
    assert isinstance(public, Records) and taught
    assert all(any(torch.equal(image, known) for known in public.images) for image in taught)


@pytest.mark.parametrize("public", [None, Records(images=torch.zeros(0, 1, 16, 16), labels=torch.zeros(0, dtype=torch.long))])
def test_without_public_images_it_says_so(federate: Make, smooth: Make, public: Records | None) -> None:
    capture = replace(federate(smooth(1)).capture, public=public)
    with pytest.raises(FlprivError, match=r"grant 'know-public' and set sites.split.public"):
        restored(SHORT, capture)
