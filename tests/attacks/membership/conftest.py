"""A small federation trained in plain PyTorch, seen as an adversary sees it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.capture import Capture, Observation
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can

TASK = Task(modality="xray", shape=(1, 12, 12), classes=("a", "b"), model="cnn", options={"width": 8})
NODES = (11, 12)
EACH = 40


Federation = tuple[Capture, Tensor]
"""A capture, and which node trained on each candidate (0: none)."""


def noise(count: int, *, seed: int) -> Records:
    """Images and labels that have nothing to do with each other: what is learned of them is memory."""
    rng = torch.Generator().manual_seed(seed)
    return Records(images=torch.rand(count, *TASK.shape, generator=rng), labels=torch.randint(2, (count,), generator=rng))


def copied(state: State) -> State:
    return {key: value.clone() for key, value in state.items()}


def train(task: Task, start: State, records: Records, *, steps: int, lr: float, seed: int = 0) -> State:
    """The model after ``steps`` SGD steps of batches of 16 from ``start``."""
    model = task.build()
    model.load_state_dict(dict(start))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    rng = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        rows = torch.randperm(len(records), generator=rng)[:16]
        optimizer.zero_grad()
        torch.autograd.backward(cross_entropy(model(records.images[rows]), records.labels[rows]))
        optimizer.step()
    return copied(model.state_dict())


def run(*, rounds: int, steps: int, lr: float, nodes: tuple[int, ...] = NODES) -> Federation:
    """Federated averaging of sites on noise."""
    sites = {node: noise(EACH, seed=node) for node in nodes}
    models = [copied(TASK.build(seed=1).state_dict())]
    seen = []
    for round in range(1, rounds + 1):
        replies = {node: train(TASK, models[-1], own, steps=steps, lr=lr, seed=round) for node, own in sites.items()}
        seen += [Observation(round=round, node=node, sent=models[-1], returned=reply) for node, reply in replies.items()]
        models.append({key: torch.stack([reply[key] for reply in replies.values()]).mean(0) for key in models[-1]})
    candidates = Records.concat([*sites.values(), noise(len(nodes) * EACH, seed=99)])
    owner = torch.tensor([node for node in (*nodes, *[0] * len(nodes)) for _ in range(EACH)])
    order = torch.randperm(len(owner), generator=torch.Generator().manual_seed(0))
    capture = Capture(
        granted=Can.SEE_FINAL | Can.SEE_MODELS | Can.SEE_UPDATES | Can.KNOW_CANDIDATES,
        task=TASK,
        observations=tuple(seen),
        models=tuple(models),
        candidates=candidates.take(order),
    )
    return capture, owner[order]


@pytest.fixture(scope="session")
def overfit() -> Federation:
    """Eight rounds of 40 steps: the sites' noise is learned by heart."""
    return run(rounds=8, steps=40, lr=0.3)


@pytest.fixture(scope="session")
def federated() -> Federation:
    """Three rounds of four steps: hardly anything is learned yet."""
    return run(rounds=3, steps=4, lr=0.1)


@pytest.fixture(scope="session")
def known(federated: Federation) -> Federation:
    """The same with public images, and a recipe that the adversary knows."""
    capture, owner = federated
    recipe = LocalRecipe(lr=0.1, batch_size=16, steps=4)
    told = tuple(replace(seen, local=recipe, examples=EACH) for seen in capture.observations)
    granted = capture.granted | Can.KNOW_PUBLIC | Can.KNOW_LOCAL
    return replace(capture, granted=granted, observations=told, public=noise(60, seed=5)), owner


@pytest.fixture(scope="session")
def four_sites() -> Federation:
    """Six rounds of 20 steps at four sites."""
    return run(rounds=6, steps=20, lr=0.3, nodes=(11, 12, 13, 14))
