"""The training loop by itself."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional

from flpriv.clients.training import Prepare, Trained, train
from flpriv.defense import Loop
from flpriv.recipe import LocalRecipe
from flpriv.records import Records

CALM = LocalRecipe(batch_size=4, epochs=2, lr=0.1)


def records(count: int = 10) -> Records:
    generator = torch.Generator().manual_seed(0)
    return Records(images=torch.rand(count, 1, 4, 4, generator=generator), labels=torch.arange(count) % 2)


def model() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))


def trained(recipe: LocalRecipe, *, seed: int = 0, prepare: Prepare | None = None) -> tuple[nn.Module, Trained]:
    done = train(net := model(), records(), recipe, classes=2, seed=seed, prepare=prepare)
    return net, done


@pytest.mark.parametrize(
    "recipe",
    [
        CALM,
        replace(CALM, momentum=0.9, weight_decay=0.01),
        replace(CALM, optimizer="adam", lr=0.01, weight_decay=0.1),
        replace(CALM, train_mode=False),
    ],
)
def test_it_is_the_plain_loop(recipe: LocalRecipe) -> None:
    net, done = trained(recipe)
    plain, data, losses = model(), records(), []
    plain.train(recipe.train_mode)
    lr, decay = recipe.lr, recipe.weight_decay
    optimizer: torch.optim.Optimizer = torch.optim.Adam(plain.parameters(), lr=lr, weight_decay=decay)
    if recipe.optimizer == "sgd":
        optimizer = torch.optim.SGD(plain.parameters(), lr=lr, momentum=recipe.momentum, weight_decay=decay)
    for rows in map(list, done.steps):
        optimizer.zero_grad()
        loss = functional.cross_entropy(plain(data.images[rows]), data.labels[rows])
        torch.autograd.backward(loss)
        optimizer.step()
        losses += [loss.item()] * len(rows)
    for ours, theirs in zip(net.state_dict().values(), plain.state_dict().values(), strict=True):
        assert torch.equal(ours, theirs)
    assert done.loss == pytest.approx(sum(losses) / len(losses), abs=1e-6)


def test_eval_mode_leaves_running_statistics() -> None:
    net, _ = trained(replace(CALM, train_mode=False))
    assert torch.equal(net.state_dict()["2.running_mean"], torch.zeros(8))
    assert not torch.equal(net.state_dict()["1.weight"], model().state_dict()["1.weight"])


def test_the_global_random_state_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    trained(CALM)
    assert torch.equal(torch.rand(3), expected)


def test_the_order_changes_with_the_seed_alone() -> None:
    one, again, other = (trained(CALM, seed=seed)[1].steps for seed in (1, 1, 2))
    assert one == again != other


def test_a_defence_reshapes_the_loop_and_is_told_the_end() -> None:
    called: list[str] = []

    def prepare(loop: Loop) -> Loop:
        assert loop.model.training
        return replace(
            loop,
            loader=[(torch.zeros(0, 1, 4, 4), torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long))] * 2,  # type: ignore[arg-type]
            loss=lambda logits, _: logits.sum() * 0,
            finish=(lambda: called.append("finished"),),
        )

    _, done = trained(CALM, prepare=prepare)
    assert done == Trained(steps=((), (), (), ()), loss=0.0)
    assert called == ["finished"]
