from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from flpriv.attacks.malicious.insertion import host, insert, prefix, received
from flpriv.errors import ScenarioError


class Doubling(nn.Module):
    """Doubles its input; holds the dense layer by which a block is found."""

    def __init__(self) -> None:
        super().__init__()
        self.bins = nn.Linear(2, 2)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return 2 * images


def test_a_block_runs_on_the_input_and_leaves_the_honest_keys() -> None:
    model = nn.Sequential(nn.Sequential(nn.Conv2d(1, 2, 1), nn.ReLU()), nn.Flatten())
    images, before, keys = torch.rand(3, 1, 4, 4), model.get_submodule("0.0"), set(model.state_dict())
    expected = model(2 * images)
    assert host(model) == "0.0"
    armed = insert(model, Doubling(), name="trap")
    assert armed is model and model.get_submodule("0.0") is before
    assert torch.equal(armed(images), expected)
    assert torch.equal(copy.deepcopy(armed)(images), expected)
    assert set(armed.state_dict()) - keys == {"0.0.trap.bins.weight", "0.0.trap.bins.bias"}


def test_a_block_is_found_by_its_own_name_alone() -> None:
    state = insert(nn.Linear(2, 2), Doubling(), name="trap").state_dict()
    assert prefix(state, "trap") == "trap"
    assert prefix(state, "rap") is None and prefix(state, "other") is None


def test_a_block_may_stand_before_a_layer() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images, inner = torch.rand(5, 1, 2, 2), model.get_submodule("3")
    expected = inner(2 * received(model, images, "3"))
    assert torch.allclose(insert(model, Doubling(), name="trap", before="3")(images), expected)
    assert host(model, "3") == "3" and prefix(model.state_dict(), "trap") == "3.trap"


def test_what_a_layer_receives() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    images = torch.rand(5, 1, 2, 2, requires_grad=True)
    seen = received(model, images, "3")
    assert torch.equal(seen, model.get_submodule("1")(images.flatten(1)).relu()) and seen.requires_grad
    assert model(images).shape == (5, 2)
    with pytest.raises(ScenarioError, match="no such layer"):
        received(model, images, "9")
