"""Clipping and Laplace noise against the formula and scipy's distribution."""

from __future__ import annotations

from math import sqrt

import pytest
import torch
from scipy.stats import kstest

from flpriv.defenses.laplace import Laplace
from flpriv.errors import ScenarioError, UpdateError
from flpriv.registry import validate
from flpriv.state import norm

from .conftest import Surroundings


def update(scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"a.weight": torch.randn(300, 200, generator=rng) * scale, "a.bias": torch.randn(300, generator=rng) * scale}


def test_clipping_scales_all_layers_together(local: Surroundings) -> None:
    before = update()
    after = Laplace(max_grad_norm=2.0, noise_multiplier=0).protect(before, local=local())
    for key, value in before.items():
        assert torch.allclose(after[key], value * 2.0 / float(norm(before)), rtol=1e-5)
    short = update(1e-4)
    assert Laplace(noise_multiplier=0).protect(short, local=local()) is short


def test_noise_is_laplace_with_deviation_z_times_c(local: Surroundings) -> None:
    before = {key: torch.zeros_like(value) for key, value in update().items()}
    after = Laplace(max_grad_norm=0.5, noise_multiplier=0.4).protect(before, local=local())
    noise = after["a.weight"].flatten().double()
    assert float(noise.std()) == pytest.approx(0.2, rel=0.02)
    assert kstest(noise.numpy(), "laplace", args=(0, 0.2 / sqrt(2))).pvalue > 0.01


def test_seeded_and_not_in_place(local: Surroundings) -> None:
    before = update()
    kept = {key: value.clone() for key, value in before.items()}
    one, two, other = (Laplace().protect(before, local=local(seed=seed))["a.bias"] for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)
    assert all(torch.equal(before[key], value) for key, value in kept.items())


def test_a_broken_update_is_refused_by_site(local: Surroundings) -> None:
    broken = update() | {"a.bias": torch.full((300,), float("nan"))}
    with pytest.raises(UpdateError, match="site A, round 1"):
        Laplace().protect(broken, local=local())


def test_noise_in_units_of_infinity_is_refused() -> None:
    with pytest.raises(ScenarioError, match="finite max_grad_norm"):
        validate(Laplace, {"max_grad_norm": float("inf")}, where="defense 'laplace'")
    assert validate(Laplace, {"max_grad_norm": float("inf"), "noise_multiplier": 0}, where="x").noise_multiplier == 0
