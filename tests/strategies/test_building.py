"""Strategies by name: the right class with the right counts, and clear errors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.serverapp import strategy as flower

from flpriv.errors import ScenarioError
from flpriv.strategies.building import build_strategy


@pytest.mark.parametrize(
    "name", ["FedAvg", "FedProx", "FedAdam", "FedYogi", "FedAdagrad", "FedAvgM", "FedMedian", "Krum", "Bulyan"]
)
def test_flowers_strategies_by_class_name(name: str) -> None:
    options = {"proximal_mu": 0.1} if name == "FedProx" else {}
    assert type(build_strategy(name, options, sites=5)) is getattr(flower, name)


@pytest.mark.parametrize(
    ("options", "counts"),
    [
        ({}, (5, 5, 5)),
        ({"fraction_train": 0.5}, (2, 5, 5)),
        ({"fraction_train": 0.1, "fraction_evaluate": 0}, (1, 0, 5)),
        ({"min_train_nodes": 3, "min_available_nodes": 4}, (3, 5, 4)),
    ],
)
def test_counts_are_what_the_federation_can_meet(options: dict[str, Any], counts: tuple[int, int, int]) -> None:
    built = build_strategy("FedAvg", options, sites=5)
    assert isinstance(built, flower.FedAvg)
    assert (built.min_train_nodes, built.min_evaluate_nodes, built.min_available_nodes) == counts


def test_without_a_number_of_sites_flowers_own_defaults_stand() -> None:
    built = build_strategy("FedAvg", {})
    assert isinstance(built, flower.FedAvg)
    assert built.min_available_nodes == 2


def test_an_import_path() -> None:
    assert type(build_strategy("flwr.serverapp.strategy.fedavg:FedAvg", {})) is flower.FedAvg


def test_a_strategy_in_a_file_of_the_scenario(tmp_path: Path) -> None:
    file = tmp_path / "quiet.py"
    file.write_text(
        "from flwr.serverapp.strategy import FedAvg, Strategy as BaseStrategy\n"
        "class Quiet(FedAvg, BaseStrategy):\n    name = 'quiet'\n"
    )
    built = build_strategy("quiet", {"fraction_train": 0.5}, sites=4, files=[file])
    assert type(built).__name__ == "Quiet"
    assert isinstance(built, flower.FedAvg)
    assert built.min_train_nodes == 2


def test_a_strategy_around_another() -> None:
    options = {"noise_multiplier": 1, "clipping_norm": 2.0, "num_sampled_clients": 4}
    built = build_strategy(
        "DifferentialPrivacyServerSideFixedClipping", {**options, "strategy": {"name": "FedAdam", "eta": 0.5}}, sites=4
    )
    assert isinstance(built, flower.DifferentialPrivacyServerSideFixedClipping)
    assert isinstance(built.strategy, flower.FedAdam)
    assert (built.strategy.eta, built.strategy.min_available_nodes) == (0.5, 4)


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("FedAvgg", {}, "unknown strategy 'FedAvgg'; did you mean 'FedAvg'?"),
        ("FedAvg", {"fraction_trian": 0.5}, "strategy 'FedAvg': unknown option 'fraction_trian'; did you mean 'fraction_train'?"),
        ("FedAvg", {"fraction_train": "half"}, "strategy 'FedAvg': fraction_train = 'half'"),
        ("FedAvg", {"min_train_nodes": 9}, "strategy 'FedAvg': min_train_nodes = 9, but there are 5 sites"),
        ("DifferentialPrivacyServerSideFixedClipping", {}, "option 'noise_multiplier' is required"),
        ("no.such.module:Thing", {}, "cannot import 'no.such.module:Thing'"),
        ("pathlib:Path", {}, "is not a flwr.serverapp.strategy.Strategy"),
        (
            "DifferentialPrivacyServerSideFixedClipping",
            {"noise_multiplier": -1.0, "clipping_norm": 1.0, "num_sampled_clients": 4},
            "non-negative",
        ),
    ],
)
def test_what_is_wrong_is_told(name: str, options: dict[str, Any], expected: str) -> None:
    with pytest.raises(ScenarioError) as caught:
        build_strategy(name, options, sites=5)
    assert expected in str(caught.value)
