"""Batch statistics against hand-made ones, and against those PyTorch keeps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import grad, vmap

from flpriv.attacks.inversion import batch_norm
from flpriv.attacks.inversion.evidence import Evidence, gather
from flpriv.attacks.inversion.unroll import Replay
from flpriv.recipe import LocalRecipe

Make = Callable[..., Any]
KNOWN = ("know-labels", "know-order")
RNG = torch.Generator().manual_seed(0)


def plain(*modules: nn.Module, train_mode: bool = True, images: int = 2) -> tuple[Replay, dict[str, Tensor]]:
    """A replay of one step on all images, and the state of the model sent."""
    model = nn.Sequential(*modules).train(train_mode).requires_grad_(False)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    start = {name: state[name] for name, _ in model.named_parameters()}
    rest = {name: value for name, value in state.items() if name not in start}
    recipe = LocalRecipe(batch_size=images, steps=1, train_mode=train_mode)
    return Replay(model=model, start=start, rest=rest, recipe=recipe, batches=(tuple(range(images)),)), state


def evidence(done: Any) -> Evidence:
    cpu = torch.device("cpu")
    return gather(done.capture, done.capture.observations[0], rng=RNG, device=cpu, max_steps=99, max_images=99, who="test")


def test_moments_of_hand_made_images() -> None:
    """Two images of two channels: means 3 and 0, unbiased variances 20 / 3 · … worked out by hand."""
    images = torch.tensor([[[[0.0, 2.0]], [[1.0, -1.0]]], [[[4.0, 6.0]], [[1.0, -1.0]]]])
    mean, var = batch_norm.moments(*plain(nn.BatchNorm2d(2)))(images)
    assert mean.tolist() == [3.0, 0.0]
    assert var.tolist() == pytest.approx([20 / 3, 4 / 3])


def test_the_distance_is_the_sum_of_euclidean_norms_and_the_first_layer_counts_more() -> None:
    second = nn.BatchNorm2d(2)
    site, state = plain(nn.BatchNorm2d(2, affine=False), second, train_mode=False)
    images = torch.tensor([[[[0.0, 2.0]], [[1.0, -1.0]]], [[[4.0, 6.0]], [[1.0, -1.0]]]])
    mean, var = torch.tensor([3.0, 0.0]), torch.tensor([20 / 3, 4 / 3])
    shifts = [torch.tensor(pair) for pair in ([3.0, 4.0], [0.0, 2.0], [1.0, 0.0], [0.0, 0.0])]
    known = [one + shift for one, shift in zip((mean, var, mean, var), shifts, strict=True)]
    both = [*known, torch.ones(2)]
    assert batch_norm.apart(site, state)(images, both).item() == pytest.approx(5 + 2 + 1, abs=1e-3)
    assert batch_norm.apart(site, state, first=10)(images, both).item() == pytest.approx(70 + 1, abs=1e-3)
    assert batch_norm.apart(site, state)(images, [*known, torch.tensor([0.0, 1.0])]).item() == pytest.approx(1, abs=1e-3)


def test_a_single_value_has_no_variance_and_no_nan() -> None:
    site, state = plain(nn.BatchNorm2d(1), train_mode=False, images=1)
    mean, var = batch_norm.moments(site, state)(torch.full((1, 1, 1, 1), 0.3))
    assert mean.item() == pytest.approx(0.3) and var.item() == 0
    slope = grad(lambda x: batch_norm.apart(site, state)(x, [mean * 0, var * 0, torch.ones(1)]))(torch.full((1, 1, 1, 1), 0.3))
    assert slope.item() == pytest.approx(1)


@pytest.mark.parametrize("momentum", [0.1, 0.6, None])
@pytest.mark.parametrize("batch_size", [4, 2, 3], ids=["a batch", "two batches", "two uneven batches"])
def test_the_statistics_left_behind_are_those_of_the_sites_own_batches(
    federate: Make, smooth: Make, shallow: str, batch_size: int, momentum: float | None
) -> None:
    """At a tiny learning rate the weights stand still, so that the statistics at the weights sent are the true ones."""
    recipe = LocalRecipe(lr=1e-6, batch_size=batch_size)
    options = {"momentum": momentum}
    done = federate(smooth(4), recipe=recipe, model=shallow, options=options, before=smooth(9, seed=5), grant=KNOWN)
    seen = evidence(done)
    *left, counts = batch_norm.left(seen, seen.labels)
    assert counts.tolist() == [1.0, 1.0]
    for told, true in zip(left, batch_norm.moments(seen.site, seen.seen.sent)(done.used.images), strict=True):
        assert torch.allclose(told, true, rtol=2e-3, atol=2e-4)
    if batch_size < 4 and momentum == 0.6:
        swapped = batch_norm.moments(seen.site, seen.seen.sent)(done.used.images.flip(0))
        assert not all(torch.allclose(a, b, rtol=2e-3, atol=2e-4) for a, b in zip(left, swapped, strict=True)), (
            "later steps weigh more"
        )


def test_running_statistics_count_once_they_have_been_gathered(federate: Make, smooth: Make, shallow: str) -> None:
    recipe = LocalRecipe(lr=0.02, batch_size=2, steps=1, train_mode=False)
    fresh, used = (evidence(federate(smooth(2), recipe=recipe, model=shallow, before=b)) for b in (None, smooth(16, seed=5)))
    assert batch_norm.gathered(fresh, fresh.labels)[-1].tolist() == [0.0, 0.0]
    *told, counts = batch_norm.gathered(used, used.labels)
    assert counts.tolist() == [1.0, 1.0]
    kept = 0.9**6  # two batches in each of three epochs
    assert torch.allclose(told[0], used.seen.sent["1.running_mean"] / (1 - kept))
    assert torch.allclose(told[3], (used.seen.sent["4.running_var"] - kept) / (1 - kept), atol=1e-6)
    assert batch_norm.left(used, used.labels)[-1].tolist() == [0.0, 0.0], "in eval mode nothing is left behind"


@pytest.mark.parametrize(
    "count", [None, torch.tensor(500), torch.tensor(0)], ids=["no counter", "many batches", "a reset counter"]
)
def test_running_statistics_are_taken_as_they_are_where_nothing_else_is_known(
    federate: Make, smooth: Make, shallow: str, count: Tensor | None
) -> None:
    done = federate(smooth(2), recipe=LocalRecipe(batch_size=2, steps=1), model=shallow, before=smooth(16, seed=5))
    seen = evidence(done)
    sent = {name: value for name, value in seen.seen.sent.items() if not name.endswith("num_batches_tracked")}
    sent |= {} if count is None else {"1.num_batches_tracked": count, "4.num_batches_tracked": count}
    *told, counts = batch_norm.gathered(replace(seen, seen=replace(seen.seen, sent=sent)), seen.labels)
    assert counts.tolist() == [1.0, 1.0]
    assert torch.equal(told[0], sent["1.running_mean"]) and torch.equal(told[3], sent["4.running_var"])


def test_models_without_batch_norm_have_no_layers(federate: Make, smooth: Make) -> None:
    seen = evidence(federate(smooth(1)))
    assert batch_norm.layers(seen.site, seen.seen.sent) == {}


@pytest.mark.parametrize("train_mode", [True, False])
def test_many_trials_at_once(federate: Make, smooth: Make, shallow: str, train_mode: bool) -> None:
    recipe = LocalRecipe(lr=0.02, batch_size=2, steps=2, train_mode=train_mode)
    done = federate(smooth(4), recipe=recipe, model=shallow, before=smooth(16, seed=5))
    seen = evidence(done)
    penalty = batch_norm.apart(seen.site, seen.seen.sent, first=10)
    known = batch_norm.gathered(seen, seen.labels)
    trials = torch.rand((3, 4, 1, 16, 16), generator=RNG)
    together = vmap(grad(lambda images: penalty(images, known)))(trials)
    alone = torch.stack([grad(lambda images: penalty(images, known))(trial) for trial in trials])
    assert torch.allclose(together, alone, atol=1e-5)
