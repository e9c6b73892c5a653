from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from flpriv.attacks.malicious.fishing import Fishing, gradient, last_layer
from flpriv.capture import Observation
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ScenarioError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import parameters
from flpriv.task import Task
from flpriv.testing import blindfold

Make = Callable[..., Any]

LADDER = Fishing(strategy="feature", rounds=(1, 2, 3, 4, 5, 6), crowd=16, most=1, then="layer-peeling")


def step(images: int) -> LocalRecipe:
    return LocalRecipe(lr=0.05, batch_size=images, steps=1, train_mode=False)


def gradients(task: Task, seen: Observation, records: Records) -> list[dict[str, Tensor]]:
    """Each record's own part of the mean gradient at the model sent."""
    model = task.build().eval()
    model.load_state_dict(dict(seen.sent))
    found = []
    for image, label in zip(records.images, records.labels, strict=True):
        slopes = torch.autograd.grad(cross_entropy(model(image[None]), label[None]) / len(records), list(model.parameters()))
        found.append({name: slope.double() for (name, _), slope in zip(model.named_parameters(), slopes, strict=True)})
    return found


def size(update: dict[str, Tensor], names: set[str]) -> float:
    return float(torch.stack([update[name].square().sum() for name in names]).sum().sqrt())


def claimed(attack: Fishing, done: Any) -> list[Reconstruction]:
    return [claim for claim in attack(done.capture) if isinstance(claim, Reconstruction)]


@pytest.mark.parametrize("model", ["cnn", "resnet18", "flpriv.testing:dense_net"])
def test_only_the_target_class_has_a_gradient_below_the_last_layer(rounds: Make, parts: Make, smooth: Make, model: str) -> None:
    options = {"inputs": 256, "classes": 4} if ":" in model else {"widen": 0.25} if model == "resnet18" else {}
    sites = parts(smooth(6, labels=4), (6,))
    done = rounds(Fishing(target=1), sites, recipe=step(6), model=model, options=options, classes=4)
    (seen,), (records,) = done.capture.observations, done.used.values()
    below = parameters(seen.sent).keys() - set(last_layer(seen.sent, done.capture.task))
    sizes = torch.tensor([size(one, below) for one in gradients(done.capture.task, seen, records)])
    assert sizes[records.labels == 1].min() > 0
    assert sizes[records.labels != 1].max() == 0


def test_what_is_isolated_is_the_update_of_the_target_class_alone(rounds: Make, parts: Make, smooth: Make) -> None:
    """The last layer's rows of other classes, where all images leave something, included; up to the scale of the target's row."""
    attack = Fishing(target=1)
    done = rounds(attack, parts(smooth(9, labels=3), (9,)), recipe=step(9), classes=3)
    (seen,), (records,), task = done.capture.observations, done.used.values(), done.capture.task
    (alone,) = attack.isolate([seen], task)
    assert alone.examples == 3
    assert alone.labels is not None and alone.labels.tolist() == [1, 1, 1]
    own = gradients(task, alone, records.take((records.labels == 1).nonzero()[:, 0]))
    for name, value in gradient(alone).items():
        expected = torch.stack([one[name] for one in own]).sum(0)
        assert torch.allclose(value, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max())), name


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "single reply"])
def test_cuts_isolate_single_images_of_a_batch(rounds: Make, parts: Make, smooth: Make, psnr: Make, summed: bool) -> None:
    sites = parts(smooth(16, seed=3), (8, 8) if summed else (16,))
    done = rounds(LADDER, sites, recipe=step(len(sites[0])), public=smooth(200, seed=4), summed=summed, count=6)
    claims = [claim for claim in claimed(LADDER, done) if len(claim.images)]
    assert claims
    everyone = torch.cat([records.images for records in sites])
    for claim in claims:
        assert claim.labels is None
        assert claim.node == (None if summed else next(iter(done.used)))
        assert psnr(claim.images, everyone).max() >= 40
    assert len({int(psnr(claim.images, everyone).argmax()) for claim in claims}) == len(claims)
    assert not any(len(claim.images) for claim in claimed(LADDER, replace(done, capture=blindfold(done.capture))))


def test_an_isolated_image_outweighs_all_others(rounds: Make, parts: Make, smooth: Make) -> None:
    """The difference of two rounds is the gradient of the one image between both cuts; the others leave a thousandth of it."""
    (records,) = sites = parts(smooth(16, seed=3), (16,))
    done = rounds(LADDER, sites, recipe=step(16), public=smooth(200, seed=4), summed=False, count=6)
    task = done.capture.task
    below = parameters(done.replies[0].sent).keys() - set(last_layer(done.replies[0].sent, task))
    alone = list(LADDER.isolate(done.replies, task))
    assert alone
    for one in alone:
        before, after = (gradients(task, done.replies[one.round - place], records) for place in (2, 1))
        apart = [{name: b[name] - a[name] for name in below} for a, b in zip(before, after, strict=True)]
        sizes = sorted(size(change, below) for change in apart)
        assert sizes[-1] > 0
        assert sum(sizes[:-1]) < 1e-3 * sizes[-1]


def test_a_single_cut_isolates_where_nobody_has_the_target_class(rounds: Make, parts: Make, smooth: Make, psnr: Make) -> None:
    attack = Fishing(strategy="feature", target=2, crowd=10, most=1, then="layer-peeling")
    found = 0
    for seed in range(4):
        (records,) = sites = parts(smooth(10, labels=2, seed=seed), (10,))
        done = rounds(attack, sites, recipe=step(10), classes=3, public=smooth(200, seed=9))
        found += sum(len(c.images) and bool(psnr(c.images, records.images).max() >= 40) for c in claimed(attack, done))
    assert found


@pytest.mark.parametrize("feature", [None, 50])
def test_cuts_count_images_of_a_residual_network(rounds: Make, parts: Make, smooth: Make, feature: int | None) -> None:
    attack = replace(LADDER, feature=feature, rounds=(1, 2))
    done = rounds(attack, parts(smooth(16), (16,)), recipe=step(16), model="resnet18", public=smooth(60, seed=4), count=2)
    (alone,) = attack.isolate(done.capture.observations, done.capture.task)
    assert alone.examples == 1


@pytest.mark.parametrize("train_mode", [True, False], ids=["train mode", "eval mode"])
def test_batch_norm_in_train_mode_lets_silenced_images_back_in(rounds: Make, parts: Make, smooth: Make, train_mode: bool) -> None:
    """An image of another class is exchanged: it does not show below the last layer, unless batches are normalised together."""
    recipe, moved = replace(step(6), train_mode=train_mode), []
    for other in (False, True):
        records = smooth(6)
        records.images[0] = 1 - records.images[0] if other else records.images[0]
        done = rounds(Fishing(target=1), parts(records, (6,)), recipe=recipe, model="resnet18")
        moved.append(gradient(done.capture.observations[0])["conv1.weight"])
    apart = float((moved[1] - moved[0]).norm() / moved[0].norm())
    assert (apart > 1e-2) if train_mode else (apart < 1e-4)


def test_the_honest_model_is_left_alone() -> None:
    task = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn")
    honest = task.build().state_dict()
    trap = LADDER.trap(task, public=None, rng=torch.Generator().manual_seed(0))
    states = [trap.arm(honest, round=round, node=1, nodes=(1, 2)) for round in range(1, 8)]
    assert states[6] is None and None not in states[:6]
    other = trap.arm(honest, round=1, node=2, nodes=(1, 2))
    assert other is not None and states[0] is not None
    assert all(other[key] is states[0][key] for key in honest), "sums stay small where all nodes are sent the same tensors"
    assert trap.disarm({k: v + 1 for k, v in honest.items()}, sent=states[0], honest=honest) is honest


def test_mistakes_are_told_with_the_way_out(rounds: Make, parts: Make, smooth: Make) -> None:
    sites = parts(smooth(8), (8,))
    with pytest.raises(FlprivError, match="the task has 2 classes"):
        rounds(Fishing(target=5), sites, recipe=step(8))
    done = rounds(Fishing(), sites, recipe=replace(step(4), steps=2))
    with pytest.raises(FlprivError, match=r"2 local steps.*set local.steps = 1"):
        Fishing()(done.capture)
    ladder = rounds(LADDER, sites, recipe=step(4), count=2)
    with pytest.raises(FlprivError, match=r"draw another 4 of 8 records.*set local.batch_size"):
        LADDER(ladder.capture)
    moved = rounds(LADDER, sites, recipe=step(8), count=2).capture
    later = replace(moved.observations[1], sent={k: v + 1 for k, v in moved.observations[1].sent.items()})
    with pytest.raises(FlprivError, match="round 2: the model below the last layer is not that of round 1"):
        LADDER(replace(moved, observations=(moved.observations[0], later)))
    with pytest.raises(FlprivError, match="no reply to the trap was captured"):
        Fishing()(replace(done.capture, observations=()))
    one = rounds(Fishing(), parts(smooth(8, labels=8), (8,)), recipe=step(8), classes=8).capture
    with pytest.raises(FlprivError, match="'imprint' does not invert single updates"):
        Fishing(then="imprint")(one)
    with pytest.raises(ScenarioError, match="unknown option 'iteration'"):
        Fishing(then_options={"iteration": 1})(one)


@pytest.mark.slow
@pytest.mark.parametrize("images", [32, 64])
def test_real_xrays_come_back_out_of_large_batches(rounds: Make, parts: Make, xrays: Any, psnr: Make, images: int) -> None:
    """Two classes, 64×64 pixels: what six cuts isolate comes back to the last bit, labels unknown."""
    attack = replace(LADDER, crowd=images)
    (records,) = sites = parts(xrays.private, (images,))
    done = rounds(attack, sites, recipe=step(images), public=xrays.public, summed=False, count=6)
    claims = [claim for claim in claimed(attack, done) if len(claim.images)]
    assert claims
    assert all(psnr(claim.images, records.images).max() >= 60 for claim in claims)
