from __future__ import annotations

import copy

import torch
from torch import nn

from flpriv.attacks.malicious.insertion import host, insert, prefix


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
