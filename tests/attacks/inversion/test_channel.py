"""Compressions looked through: hand counts, the truth costs nothing, and images come back that plain matching loses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as some
from torch import Tensor
from torch.func import grad, vmap

from flpriv.attacks.inversion.channel import clipped, recognise, rounded, rounding_noise, signs, sparse, through
from flpriv.attacks.inversion.inverting_gradients import InvertingGradients
from flpriv.attacks.inversion.objective import Objective, cosine, relative, squared
from flpriv.claim import Reconstruction
from flpriv.defense import Local
from flpriv.errors import FlprivError
from flpriv.registry import create
from flpriv.state import add

Make = Callable[..., Any]
Stack = tuple[tuple[str, Mapping[str, Any]], ...]
LR = 0.05


def gradient(seed: int = 0) -> list[Tensor]:
    """Three tensors of Laplace's density; a third of the entries is 0, as behind ReLUs."""
    rng = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        value = torch.empty(shape).exponential_(generator=rng) * torch.randn(shape, generator=rng).sign()
        return value * (torch.rand(shape, generator=rng) > 1 / 3)

    return [draw(40, 60), draw(8, 3, 3, 3) * 5, torch.randn(10, generator=rng)]


def sent(value: Sequence[Tensor], stack: Stack, *, seed: int = 0) -> list[Tensor]:
    """What the adversary has after the real defences: the update in units of the gradient."""
    update: Mapping[str, Tensor] = {str(place): -LR * one for place, one in enumerate(value)}
    for name, options in stack:
        here = Local(site="A", round=1, rng=torch.Generator().manual_seed(seed))
        update = create("defenses", name, options).protect(update, local=here)
    return [one / -LR for one in update.values()]


def test_what_was_not_sent_is_free_up_to_the_smallest_sent() -> None:
    channel = sparse([torch.tensor([0.0, 0.0, -2.0, 5.0, 0.0])])
    assert torch.equal(channel([torch.tensor([1.5, -3.0, -1.0, 9.0, 0.0])])[0], torch.tensor([0.0, -1.0, -1.0, 9.0, 0.0]))


def test_noise_added_after_does_not_count_as_sent() -> None:
    channel = sparse([torch.tensor([0.1, -0.2, -2.0, 5.0])], blur=0.3)
    assert torch.equal(channel([torch.tensor([1.5, -3.0, -1.0, 9.0])])[0], torch.tensor([0.0, -1.0, -1.0, 9.0]))


def test_a_tensor_of_which_nothing_was_sent_is_all_zeros() -> None:
    trial = torch.tensor([1.0, -2.0])
    assert torch.equal(sparse([torch.zeros(2)])([trial])[0], trial)


def test_rounding_is_forgiven_up_to_half_a_step() -> None:
    """3 bits up to 6: steps of 2. Beyond a half the difference counts three times."""
    channel = rounded([torch.tensor([6.0, 2.0, 0.0, -4.0])], bits=3)
    after = channel([torch.tensor([5.1, 3.5, -0.9, -7.0])])[0]
    assert torch.allclose(after, torch.tensor([6.0, 2.0 + 3 * 0.5, 0.0, -4.0 - 3 * 2.0]))


def test_signs_are_reached_fast_and_left_slowly() -> None:
    """Four of five were sent, at the mean of all, 2: their own mean was 2.5."""
    channel = signs([torch.tensor([2.0, -2.0, 2.0, 0.0, 2.0])])
    after = channel([torch.tensor([0.075, -90.0, -0.25, 0.25, 0.0])])[0]
    assert torch.allclose(after, 2 * torch.tensor([1.0, -90.0, -1.0, 1.0, 0.0]).tanh())


def test_signs_of_the_largest_leave_the_others_free_up_to_their_mean() -> None:
    channel = sparse([torch.tensor([1.0, 0.0, 0.0, -1.0])], signed=True)
    assert torch.equal(channel([torch.tensor([3.0, 1.9, -2.5, 0.1])])[0], torch.tensor([3.0, 0.0, -0.5, 0.1]))


def test_clipping_is_over_all_tensors_together() -> None:
    trial = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert [one.item() for one in clipped(limit=1.0)(trial)] == pytest.approx([0.6, 0.8])
    assert clipped(limit=float("inf"))(trial) == clipped(limit=5.1)(trial) == trial


EXACT: list[Stack] = [
    (("top-k", {"keep": 0.1}),),
    (("uniform-quantiser", {"bits": 3}),),
    (("top-k", {"keep": 0.2}), ("uniform-quantiser", {"bits": 4})),
    (("uniform-quantiser", {"bits": 4}), ("top-k", {"keep": 0.2})),
    (("gaussian", {"max_grad_norm": 0.7, "noise_multiplier": 0.0}), ("top-k", {"keep": 0.1})),
    (("laplace", {"max_grad_norm": 0.7, "noise_multiplier": 0.0}), ("uniform-quantiser", {"bits": 3})),
]


@pytest.mark.parametrize("base", [cosine, squared, relative])
@pytest.mark.parametrize("stack", EXACT, ids=lambda stack: "+".join(name for name, _ in stack))
@settings(max_examples=5, deadline=None)
@given(seed=some.integers(0, 10_000))
def test_the_truth_costs_nothing(stack: Stack, base: Objective, seed: int) -> None:
    truth = gradient(seed)
    target = sent(truth, stack)
    assert through(target, defenses=stack, base=base, lr=LR)(truth).item() == pytest.approx(0, abs=2e-6)
    assert base(truth, target).item() > 1e-3
    assert through(target, defenses=stack, base=base, lr=LR)(gradient(seed + 1)).item() > 0.1


def test_the_truth_has_the_right_signs() -> None:
    truth = gradient()
    compare = through(sent(truth, (("sign-sgd", {}),)), defenses=(("sign-sgd", {}),), base=cosine, lr=LR)
    assert compare(truth).item() < 0.03 < 0.2 < cosine(truth, sent(truth, (("sign-sgd", {}),))).item()
    turned = [truth[0] * torch.where(torch.arange(60) < 6, -1, 1), *truth[1:]]
    assert compare(turned).item() > 5 * compare(truth).item()


def test_options_are_in_units_of_the_update() -> None:
    """The norm of the update is lr times that of the trial: at half of it, half of the trial is left."""
    truth = gradient()
    length = float(torch.cat([one.flatten() for one in truth]).norm())
    stack = (("gaussian", {"max_grad_norm": LR * length / 2, "noise_multiplier": 0.0}),)
    compare = through([one / 2 for one in truth], defenses=stack, base=relative, lr=LR)
    assert compare(truth).item() == pytest.approx(0, abs=1e-6)
    assert compare([one / 4 for one in truth]).item() == pytest.approx(0.25, rel=1e-4)


@pytest.mark.parametrize("levels", [2, 4, 16])
def test_the_noise_of_random_rounding_is_judged_from_what_it_left(levels: int) -> None:
    truth = gradient()
    target = sent(truth, (("qsgd", {"levels": levels}),))
    noise = sum(float((a - b).square().sum()) for a, b in zip(target, truth, strict=True))
    assert float(rounding_noise(target, levels=levels)) == pytest.approx(noise, rel=0.8)


@pytest.mark.parametrize("name", ["gaussian", "laplace"])
def test_a_noisy_update_counts_by_its_share_of_signal(name: str) -> None:
    truth = gradient()
    length = float(torch.cat([one.flatten() for one in truth]).norm())
    entries = sum(one.numel() for one in truth)
    stack = ((name, {"max_grad_norm": 10 * LR * length, "noise_multiplier": 0.1 / entries**0.5}),)
    target = sent(truth, stack)
    counted, plain = through(target, defenses=stack, base=cosine, lr=LR)(truth).item(), cosine(truth, target).item()
    assert counted / plain == pytest.approx(0.5, abs=0.05)
    drowned = ((name, {"max_grad_norm": 10 * LR * length, "noise_multiplier": 10.0}),)
    assert 0 < through(target, defenses=drowned, base=cosine, lr=LR)(truth).item() <= 0.02 * 2


@pytest.mark.parametrize("defenses", [None, (), (("dp-sgd", {"noise_multiplier": 1.0}), ("model-guard", {}), ("another", {}))])
def test_what_does_not_touch_the_update_changes_nothing(defenses: Stack | None) -> None:
    one, other = gradient(0), gradient(1)
    assert through(one, defenses=defenses, base=cosine, lr=LR)(other) == cosine(other, one)


def test_zeros_of_random_rounding_after_top_k_are_evidence() -> None:
    """They are compared: a trial with small entries there is judged as if there had been no top-k."""
    one, other = sent(gradient(0), (("top-k", {"keep": 0.3}), ("qsgd", {"levels": 4}))), gradient(1)
    both = through(one, defenses=(("top-k", {"keep": 0.3}), ("qsgd", {"levels": 4})), base=cosine, lr=LR)(other)
    assert both == through(one, defenses=(("qsgd", {"levels": 4}),), base=cosine, lr=LR)(other)


STACKS: list[Stack] = [
    *EXACT,
    (("sign-sgd", {}),),
    (("qsgd", {"levels": 8}),),
    (("top-k", {"keep": 0.2}), ("sign-sgd", {})),
    (("top-k", {"keep": 0.2}), ("gaussian", {"max_grad_norm": 1.0, "noise_multiplier": 0.001})),
    (("sign-sgd", {}), ("laplace", {"max_grad_norm": 1.0, "noise_multiplier": 0.001})),
]


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "+".join(name for name, _ in stack))
def test_many_at_once_are_each_by_itself(stack: Stack) -> None:
    targets = [sent(gradient(seed), stack) for seed in range(3)]
    trials = [[one.clone() for one in gradient(seed + 5)] for seed in range(3)]

    def value(trial: list[Tensor], target: list[Tensor]) -> Tensor:
        return through(target, defenses=stack, base=cosine, lr=LR)(trial)

    def stacked(rows: list[list[Tensor]]) -> list[Tensor]:
        return [torch.stack(column) for column in zip(*rows, strict=True)]

    together = vmap(grad(value))(stacked(trials), stacked(targets))
    apart = stacked([grad(value)(trial, target) for trial, target in zip(trials, targets, strict=True)])
    for one, other in zip(together, apart, strict=True):
        assert bool(torch.isfinite(one).all()) and bool(one.any())
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("stack", STACKS, ids=lambda stack: "+".join(name for name, _ in stack))
@pytest.mark.parametrize("trial", ["zeros", "truth"])
def test_slopes_are_finite_where_entries_are_zero(stack: Stack, trial: str) -> None:
    truth = gradient()
    at = [torch.zeros_like(one) for one in truth] if trial == "zeros" else truth
    for target in (sent(truth, stack), [torch.zeros_like(one) for one in truth]):
        slopes = grad(through(target, defenses=stack, base=cosine, lr=LR))(at)
        assert all(bool(torch.isfinite(one).all()) for one in slopes)


@pytest.mark.parametrize("base", [cosine, squared])
def test_the_slope_through_sparse_is_that_of_its_value(base: Objective) -> None:
    """Against differences, in float64."""
    rng = torch.Generator().manual_seed(2)
    target = [one.double() for one in sent(gradient(), (("top-k", {"keep": 0.1}),))]
    trial = [one.double() + 0.3 * torch.randn(one.shape, generator=rng, dtype=torch.float64) for one in gradient()]
    compare = through(target, defenses=(("top-k", {"keep": 0.1}),), base=base, lr=LR)
    slope, way = grad(compare)(trial), [torch.randn(one.shape, generator=rng, dtype=torch.float64) for one in trial]
    ahead, behind = (compare([t + e * w for t, w in zip(trial, way, strict=True)]) for e in (1e-6, -1e-6))
    along = sum(float((s * w).sum()) for s, w in zip(slope, way, strict=True))
    assert float(ahead - behind) / 2e-6 == pytest.approx(along, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize(
    ("name", "options"),
    [("gaussian", {"max_grad_norm": 1.0}), ("laplace", {}), ("qsgd", {}), ("uniform-quantiser", {})],
)
def test_a_defence_without_its_strength_is_refused(name: str, options: dict[str, float]) -> None:
    with pytest.raises(FlprivError, match=f"'{name}' without its '(max_grad_norm|noise_multiplier|levels|bits)'"):
        through(gradient(), defenses=((name, options),), base=cosine, lr=LR)


def compressed(done: Any, stack: Stack, *, told: Stack | None) -> Any:
    """The capture as if its site had used these defences, and the adversary were told of others."""
    seen = done.capture.observations[0]
    update: Mapping[str, Tensor] = seen.update
    for name, options in stack:
        here = Local(site="A", round=1, rng=torch.Generator().manual_seed(0))
        update = create("defenses", name, options).protect(update, local=here)
    seen = replace(seen, returned={**seen.returned, **add(seen.sent, update)}, defenses=told)
    return replace(done.capture, observations=(seen,))


@pytest.mark.parametrize(
    ("stack", "found"),
    [
        ((), ()),
        ((("top-k", {"keep": 0.05}),), (("top-k", {}),)),
        ((("top-k", {"keep": 0.5}),), (("top-k", {}),)),
        ((("sign-sgd", {}),), (("sign-sgd", {}),)),
        ((("qsgd", {}),), ()),
        ((("qsgd", {"levels": 2}),), ()),
        ((("uniform-quantiser", {}),), ()),
        ((("gaussian", {}),), ()),
    ],
    ids=str,
)
@pytest.mark.parametrize("model", ["cnn", "lenet"])
def test_what_an_update_tells_by_itself(federate: Make, smooth: Make, stack: Stack, found: Stack, model: str) -> None:
    """Read from an update as it is captured, rounded to the precision of the weights."""
    capture = compressed(federate(smooth(1, (1, 24, 24), seed=3), model=model), stack, told=None)
    assert recognise(list(capture.observations[0].update.values())) == found


def test_nothing_is_recognised_in_nothing() -> None:
    assert recognise([torch.zeros(3, 4), torch.zeros(2)]) == ()


def inverted(capture: Any, psnr: Make, images: Tensor, **options: Any) -> float:
    (claim,) = InvertingGradients(**{"exact": False, **options})(capture)
    assert isinstance(claim, Reconstruction)
    return float(psnr(claim.images, images).mean())


@pytest.mark.parametrize(
    ("stack", "least"), [((("top-k", {"keep": 0.05}),), 20), ((("sign-sgd", {}),), 15)], ids=["top-k", "sign-sgd"]
)
def test_who_knows_the_compression_gets_the_image(federate: Make, smooth: Make, psnr: Make, stack: Stack, least: float) -> None:
    """Told, or left to see for himself, he does better than one who matches the update as it stands."""
    done = federate(smooth(1, (1, 24, 24), seed=3), classes=10, options={"width": 16})
    known, seen, plain = (
        inverted(compressed(done, stack, told=told), psnr, done.used.images, iterations=120, exact=False)
        for told in (stack, None, ())
    )
    assert known == pytest.approx(seen, abs=0.5)
    assert known >= max(least, plain + 5), (known, plain)
