from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.malicious.model_inconsistency import ModelInconsistency, silent, switch
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe
from flpriv.task import Task
from flpriv.testing import blindfold

Make = Callable[..., Any]

STEP = LocalRecipe(lr=0.05, batch_size=4, steps=1, train_mode=False)


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("cnn", {}),
        ("cnn", {"activation": "gelu"}),
        ("cnn", {"activation": "softplus"}),
        ("lenet", {}),
        ("resnet18", {"widen": 0.25}),
        ("flpriv.testing:dense_net", {"inputs": 256, "classes": 3}),
    ],
    ids=["cnn", "gelu", "softplus", "sigmoid", "resnet18", "dense"],
)
@pytest.mark.parametrize(
    "recipe", [STEP, replace(STEP, train_mode=True, weight_decay=0.01, momentum=0.9)], ids=["plain", "other"]
)
def test_a_sum_tells_the_targets_own_update(
    rounds: Make, parts: Make, smooth: Make, model: str, options: dict[str, Any], recipe: LocalRecipe
) -> None:
    attack = ModelInconsistency(target=1)
    done = rounds(attack, parts(smooth(12, labels=3), (4, 4, 4)), recipe=recipe, model=model, options=options, classes=3)
    (seen,) = done.capture.observations
    alone, own = attack.isolate(done.capture, seen), done.replies[1]
    assert (alone.node, alone.examples, alone.trap) == (own.node, 4, "")
    assert all(torch.equal(alone.sent[key], own.sent[key]) for key in own.sent)
    for key, value in own.update.items():
        rounding = 8 * torch.finfo(torch.float32).eps * (own.sent[key].norm() + seen.sent[key].norm())
        assert value.any(), key
        assert (alone.update[key] - value).norm() <= 1e-5 * value.norm() + rounding, key


def test_weights_are_isolated_over_several_steps_and_the_bias_nearly(rounds: Make, parts: Make, smooth: Make) -> None:
    attack = ModelInconsistency()
    recipe = LocalRecipe(lr=0.05, batch_size=2, steps=3)
    for model in ("cnn", "resnet18"):
        options = {"widen": 0.25} if model == "resnet18" else {}
        done = rounds(attack, parts(smooth(12), (6, 6)), recipe=recipe, model=model, options=options)
        alone, own = attack.isolate(done.capture, done.capture.observations[0]), done.replies[0]
        for key, value in own.update.items():
            rounding = 8 * torch.finfo(torch.float32).eps * own.sent[key].norm()
            most = 0.1 if key == "fc.bias" else 1e-5
            assert (alone.update[key] - value).norm() <= most * value.norm() + rounding, key


def test_sites_of_other_sizes_change_the_scale_alone(rounds: Make, parts: Make, smooth: Make) -> None:
    attack = ModelInconsistency()
    done = rounds(attack, parts(smooth(12), (3, 9)), recipe=replace(STEP, batch_size=16))
    alone, own = attack.isolate(done.capture, done.capture.observations[0]), done.replies[0]
    for key, value in own.update.items():
        rounding = 8 * torch.finfo(torch.float32).eps * own.sent[key].norm()
        assert (2 * alone.update[key] - value).norm() <= 1e-5 * value.norm() + rounding, key


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "single replies"])
def test_images_of_the_target_come_back(rounds: Make, parts: Make, smooth: Make, psnr: Make, summed: bool) -> None:
    """By layer peeling through convolutions, which needs the isolated bias; blindfolded by nothing."""
    attack = ModelInconsistency(target=2, then="layer-peeling")
    done = rounds(attack, parts(smooth(16, labels=4), (4,) * 4), recipe=STEP, classes=6, summed=summed)
    target = list(done.used)[2]
    (claim,) = attack(done.capture)
    assert isinstance(claim, Reconstruction)
    assert (claim.round, claim.node) == (1, target)
    assert psnr(claim.images, done.used[target].images).min() >= 60
    (blind,) = attack(blindfold(done.capture))
    assert isinstance(blind, Reconstruction)
    assert not len(blind.images) or psnr(blind.images, done.used[target].images).max() < 25


def test_a_batch_comes_back_through_a_dense_layer(rounds: Make, parts: Make, smooth: Make, psnr: Make) -> None:
    options = {"inputs": 256, "classes": 2}
    attack = ModelInconsistency(then="dense-relu", then_options={"samples": 20000})
    done = rounds(attack, parts(smooth(12), (4,) * 3), recipe=STEP, model="flpriv.testing:dense_net", options=options)
    (claim,) = attack(done.capture)
    assert isinstance(claim, Reconstruction)
    assert psnr(claim.images, done.used[claim.node].images).min() >= 60


@pytest.mark.parametrize("model", ["cnn", "lenet", "resnet18"])
def test_only_the_last_bias_moves_in_a_silenced_model(model: str) -> None:
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model=model)
    assert switch(task) == ("conv3" if model == "lenet" else "")
    trap = ModelInconsistency().trap(task, public=None, rng=torch.Generator().manual_seed(0))
    honest = task.build().state_dict()
    state = trap.silence(honest)
    names = {name for name, _ in task.build().named_parameters()}
    assert names - set(silent(task, state, steps=3)) == {"fc.bias"}
    assert names - set(silent(task, honest, steps=3)) > {"fc.bias"}


def test_the_honest_model_is_left_alone() -> None:
    task = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn")
    honest = task.build().state_dict()
    before = {key: value.clone() for key, value in honest.items()}
    trap = ModelInconsistency(rounds=(2,)).trap(task, public=None, rng=torch.Generator().manual_seed(0))
    assert trap.arm(honest, round=1, node=5, nodes=(5, 6)) is None
    sent = trap.arm(honest, round=2, node=5, nodes=(5, 6))
    rest = trap.arm(honest, round=2, node=6, nodes=(5, 6))
    assert sent is not None and rest is not None
    assert sent["conv2.weight"][1:].equal(honest["conv2.weight"][1:])
    assert not any(value.any() for value in rest.values())
    assert all(torch.equal(value, honest[key]) for key, value in before.items())
    assert trap.disarm({k: v + 1 for k, v in honest.items()}, sent=rest, honest=honest) is honest


def test_mistakes_are_told_with_the_way_out(rounds: Make, parts: Make, smooth: Make) -> None:
    sites = parts(smooth(4), (2, 2))
    with pytest.raises(FlprivError, match=r"target = 2: 2 nodes are addressed in round 1, counted from 0"):
        rounds(ModelInconsistency(target=2), sites, recipe=STEP)
    capture = rounds(ModelInconsistency(), sites, recipe=STEP).capture
    with pytest.raises(FlprivError, match="lacks the global model before it; grant 'see-models'"):
        ModelInconsistency()(replace(capture, models=()))
    with pytest.raises(FlprivError, match="nothing of the target, place 0, was captured"):
        ModelInconsistency()(replace(capture, observations=()))
    with pytest.raises(FlprivError, match="'loki' does not invert single updates"):
        ModelInconsistency(then="loki")(capture)


def test_a_real_xray_comes_back_out_of_a_sum_of_six(rounds: Make, parts: Make, xrays: Any, psnr: Make) -> None:
    attack = ModelInconsistency(target=3)
    recipe = replace(STEP, batch_size=1)
    done = rounds(attack, parts(xrays.private, (1,) * 6), recipe=recipe, public=xrays.public)
    (claim,) = attack(done.capture)
    assert isinstance(claim, Reconstruction)
    assert claim.node == list(done.used)[3]
    assert psnr(claim.images, done.used[claim.node].images).min() >= 60
