from __future__ import annotations

from dataclasses import asdict, replace

import pytest
import torch
from torch.nn.functional import cross_entropy

from flpriv.attacks.membership.federation import ASSUMED, Course, course, federate
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import validate
from flpriv.task import Task

TASK = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn", options={"width": 4})
RECIPE = LocalRecipe(lr=0.05, momentum=0.5, weight_decay=1e-3, batch_size=6, epochs=2)


def records(count: int = 24) -> Records:
    rng = torch.Generator().manual_seed(3)
    return Records(images=torch.rand(count, *TASK.shape, generator=rng), labels=torch.arange(count) % 3 % 2)


def one_node(recipe: LocalRecipe, *, rounds: int = 1) -> Course:
    return Course(shares=(1.0,), examples=None, rounds=rounds, recipe=recipe)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("loss", ["cross-entropy", "balanced-cross-entropy"])
def test_a_whole_batch_a_step_is_the_sites_own_training(optimizer: str, loss: str) -> None:
    """Where the order of records does not matter, the local loop of the sites gives the same weights."""
    recipe = validate(LocalRecipe, {**asdict(RECIPE), "optimizer": optimizer, "loss": loss, "batch_size": 24}, where="test")
    own = records()
    start = TASK.build(seed=4).state_dict()
    model = TASK.build()
    model.load_state_dict(start)
    train(model, own, recipe, classes=2, seed=0)
    found = federate(TASK, one_node(recipe), own, start=start, seed=1)
    for key, value in model.state_dict().items():
        assert torch.allclose(found[key], value, atol=1e-5), key


def test_nodes_are_averaged_by_their_records() -> None:
    """One step of a node on all its records is a gradient; the mean over nodes by records is the step on everybody's."""
    recipe = LocalRecipe(lr=0.1, batch_size=100, steps=1)
    own, start = records(), TASK.build(seed=4).state_dict()
    model = TASK.build()
    model.load_state_dict(start)
    torch.autograd.backward(cross_entropy(model(own.images), own.labels))
    stepped = {key: start[key] - 0.1 * p.grad for key, p in model.named_parameters() if p.grad is not None}
    way = Course(shares=(0.5, 0.25, 0.25), examples=24, rounds=1, recipe=recipe)
    found = federate(TASK, way, own, start=start, seed=1)
    for key, value in stepped.items():
        assert torch.allclose(found[key], value, atol=1e-6), key


def test_equal_seeds_give_equal_models_and_leave_the_global_state_alone() -> None:
    way = Course(shares=(0.4, 0.6), examples=None, rounds=2, recipe=RECIPE)
    before = torch.random.get_rng_state()
    one, two, other = (federate(TASK, way, records(), start=None, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(before, torch.random.get_rng_state())
    assert all(torch.equal(one[key], two[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


def test_more_nodes_than_records_still_train() -> None:
    way = Course(shares=(0.01,) * 100, examples=None, rounds=1, recipe=RECIPE)
    assert federate(TASK, way, records(3), start=None, seed=0)


@pytest.mark.parametrize("shape", [(1, 16, 16), (1, 8, 8, 8)])
def test_batch_normalisation_and_volumes(shape: tuple[int, ...]) -> None:
    task = replace(TASK, shape=shape, model="resnet18", options={"widen": 0.125})
    own = Records(images=torch.rand(8, *shape), labels=torch.arange(8) % 2)
    found = federate(task, one_node(replace(RECIPE, batch_size=4), rounds=2), own, start=None, seed=0)
    assert found.keys() == task.build().state_dict().keys()
    means = [value for key, value in found.items() if key.endswith("running_mean")]
    assert means and all(bool(value.any()) for value in means)


def test_the_course_is_what_the_capture_tells(overfit: tuple[Capture, torch.Tensor]) -> None:
    capture = replace(overfit[0], models=overfit[0].models[:4])
    bare = Observation(round=1, node=None, sent={}, returned={}, local=RECIPE, examples=40)
    told = [replace(bare, round=r, node=n, examples=e) for r in (1, 2, 3) for n, e in ((5, 30), (6, 10))]
    assert course(replace(capture, observations=tuple(told)), epochs=9) == Course(
        shares=(0.75, 0.25), examples=40, rounds=3, recipe=RECIPE
    )
    sums = [replace(bare, round=r, nodes=(5, 6, 7, 8)) for r in (1, 2, 3)]
    assert course(replace(capture, observations=tuple(sums)), epochs=9) == Course(
        shares=(0.25,) * 4, examples=40, rounds=3, recipe=RECIPE
    )
    assert course(replace(capture, observations=()), epochs=9) == Course(
        shares=(1.0,), examples=None, rounds=1, recipe=replace(ASSUMED, epochs=9)
    )
