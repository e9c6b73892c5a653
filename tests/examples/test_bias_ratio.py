"""The example of an attack in one file: found, sound, and stopped by the defences that should stop it."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest
import torch

from flpriv import registry, scenario
from flpriv.attack import Attack
from flpriv.claim import Goal
from flpriv.defense import Defense, Local
from flpriv.defenses.gaussian import Gaussian
from flpriv.defenses.top_k import TopK
from flpriv.errors import FlprivError
from flpriv.state import add
from flpriv.testing import Glass, check_attack, glass, score

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
FILE = EXAMPLES / "bias_ratio.py"


@pytest.fixture(scope="module")
def attack() -> Attack:
    made: Attack = registry.create("attacks", "bias-ratio", {}, files=[FILE])
    return made


def defended(made: Glass, defense: Defense) -> Glass:
    def protect(place: int) -> Local:
        return Local(site="A", round=1, rng=torch.Generator().manual_seed(place))

    seen = tuple(
        replace(one, returned=add(one.sent, defense.protect(one.update, local=protect(place))))
        for place, one in enumerate(made.capture.observations)
    )
    return replace(made, capture=replace(made.capture, observations=seen))


def test_it_is_short_and_sound(attack: Attack) -> None:
    assert len(FILE.read_text().splitlines()) < 40
    sees, guesses = check_attack(attack)
    assert sees > 60 and guesses < 20


def test_the_scenario_finds_it_by_its_file() -> None:
    read = scenario.read(EXAMPLES / "your_attack.toml")
    assert read.plugins == (FILE,)
    assert registry.find("attacks", "bias-ratio", files=read.plugins).__name__ == "BiasRatio"


def test_an_installed_package_brings_it_by_an_entry_point(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint(name="bias-ratio", value="bias_ratio:BiasRatio", group="flpriv.attacks")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point] if group == point.group else [])
    monkeypatch.syspath_prepend(str(EXAMPLES))
    registry._installed.cache_clear()
    try:
        assert registry.create("attacks", "bias-ratio", {"most": 3}).most == 3
    finally:
        registry._installed.cache_clear()
        sys.modules.pop("bias_ratio", None)


def test_a_model_without_a_dense_first_layer_is_named(attack: Attack) -> None:
    with pytest.raises(FlprivError, match="no dense layer over whole images"):
        attack(glass(Goal.RECONSTRUCTION, model="cnn").capture)


@pytest.mark.parametrize(
    ("defense", "stops"),
    [
        (Gaussian(max_grad_norm=1.0, noise_multiplier=1e-6), False),
        (Gaussian(max_grad_norm=1.0, noise_multiplier=0.1), True),
        (Gaussian(max_grad_norm=1e-3, noise_multiplier=0), False),
        (TopK(keep=0.9), False),
        (TopK(keep=0.01), True),
    ],
)
def test_what_stops_it_and_what_does_not(attack: Attack, defense: Defense, stops: bool) -> None:
    made = glass(Goal.RECONSTRUCTION)
    open_score = score(attack(made.capture), made.truth)
    shut = defended(made, defense)
    left = score(attack(shut.capture), shut.truth)
    assert open_score > 60
    assert left < 15 if stops else left > 22, f"{open_score:.1f} dB without, {left:.1f} dB with the defence"
