"""Clipping and noise against the formula, and ε against Opacus' accountant."""

from __future__ import annotations

import pytest
import torch
from opacus.accountants import RDPAccountant

from flpriv.defenses.gaussian import Gaussian
from flpriv.errors import ScenarioError, UpdateError
from flpriv.registry import validate
from flpriv.state import norm

from .conftest import Surroundings


def update(scale: float = 1.0) -> dict[str, torch.Tensor]:
    rng = torch.Generator().manual_seed(1)
    return {"a.weight": torch.randn(300, 200, generator=rng) * scale, "a.bias": torch.randn(300, generator=rng) * scale}


def test_clipping_scales_all_layers_together(local: Surroundings) -> None:
    before = update()
    after = Gaussian(max_grad_norm=2.0, noise_multiplier=0).protect(before, local=local())
    assert float(norm(after)) == pytest.approx(2.0, rel=1e-5)
    for key, value in before.items():
        assert torch.allclose(after[key], value * 2.0 / float(norm(before)), rtol=1e-5)


def test_a_short_update_is_not_touched_without_noise(local: Surroundings) -> None:
    before = update(1e-4)
    assert Gaussian(max_grad_norm=1.0, noise_multiplier=0).protect(before, local=local()) is before
    assert Gaussian(max_grad_norm=float("inf"), noise_multiplier=0).protect(update(), local=local()).keys() == before.keys()


def test_noise_is_normal_with_deviation_z_times_c(local: Surroundings) -> None:
    before = update(1e-5)
    after = Gaussian(max_grad_norm=0.5, noise_multiplier=0.4).protect(before, local=local())
    noise = (after["a.weight"] - before["a.weight"]).flatten() / 0.2
    assert float(noise.mean()) == pytest.approx(0, abs=0.02)
    assert float(noise.std()) == pytest.approx(1, abs=0.02)
    assert float((noise.abs() < 1).double().mean()) == pytest.approx(0.6827, abs=0.01)


def test_seeded_and_safe_on_a_zero_update(local: Surroundings) -> None:
    defense = Gaussian()
    zero = {key: torch.zeros_like(value) for key, value in update().items()}
    one, two, other = (defense.protect(zero, local=local(seed=seed)) for seed in (1, 1, 2))
    assert torch.equal(one["a.weight"], two["a.weight"]) and not torch.equal(one["a.weight"], other["a.weight"])
    assert all(torch.isfinite(value).all() for value in one.values())


def test_a_broken_update_is_refused_by_site(local: Surroundings) -> None:
    broken = update() | {"a.bias": torch.full((300,), float("nan"))}
    with pytest.raises(UpdateError, match="site A, round 1"):
        Gaussian().protect(broken, local=local())


def test_formal_epsilon_composes_over_rounds(local: Surroundings) -> None:
    defense = Gaussian(noise_multiplier=8.0, formal=True)
    for number in (1, 2, 3):
        here = local(number)
        defense.protect(update(), local=here)
        books = RDPAccountant()
        books.history = [(4.0, 1.0, number)]
        assert here.notes["epsilon"] == pytest.approx(books.get_epsilon(delta=1e-5))


@pytest.mark.parametrize(
    "options", [{"formal": True, "noise_multiplier": 0}, {"max_grad_norm": float("inf")}, {"max_grad_norm": 0}]
)
def test_options_that_promise_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ScenarioError, match="defense 'gaussian'"):
        validate(Gaussian, options, where="defense 'gaussian'")
