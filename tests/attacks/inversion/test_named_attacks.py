"""What the named optimisation attacks have in common: one image comes back, and many at once are the same as one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.inversion.evidence import gather
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.problems import Problems, assemble
from flpriv.claim import Reconstruction
from flpriv.recipe import LocalRecipe
from flpriv.registry import create
from flpriv.state import add
from flpriv.testing import blindfold

Make = Callable[..., Any]

SEARCHES: Mapping[str, Mapping[str, Any]] = {
    "dlg": {"restarts": 1},
    "idlg": {"restarts": 1},
    "cpl": {"restarts": 1},
    "inverting-gradients": {},
    "modern-inverting-gradients": {},
    "see-through-gradients": {"restarts": 2},
    "bn-aware": {},
}
LEAST = {"modern-inverting-gradients": 25, "inverting-gradients": 28, "see-through-gradients": 30}
"""PSNR in dB after 150 evaluations; 35 for the others. Total variation and noise cost precision."""
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def attack(name: str, **options: Any) -> MatchingAttack:
    made = create("attacks", name, {"exact": False, "device": "cpu", **SEARCHES[name], **options})
    assert isinstance(made, MatchingAttack)
    return made


def one(claims: Any) -> Reconstruction:
    (claim,) = claims
    assert isinstance(claim, Reconstruction)
    return claim


@pytest.mark.parametrize("name", SEARCHES)
def test_an_image_comes_back_within_few_evaluations(federate: Make, smooth: Make, psnr: Make, name: str) -> None:
    done = federate(smooth(1, (1, 20, 20), labels=1, seed=3), mean=0.4, std=0.2, public=smooth(6, (1, 20, 20), seed=9))
    search = attack(name, iterations=150)
    claim, blind = one(search(done.capture)), one(search(blindfold(done.capture)))
    assert psnr(claim.images, done.used.images).item() >= LEAST.get(name, 35)
    assert psnr(claim.images, done.used.images).item() > psnr(blind.images, done.used.images).item() + 15
    assert claim.labels is not None and claim.labels.tolist() == done.used.labels.tolist()
    assert claim.method == "search"


@pytest.mark.parametrize(
    ("name", "what", "least"),
    [
        ("idlg", "update", 80),
        ("idlg", "model returned", 70),
        ("idlg", "both models", 60),
        ("inverting-gradients", "update", 45),
        ("inverting-gradients", "both models", 45),
    ],
)
def test_half_precision_costs_little(federate: Make, smooth: Make, psnr: Make, name: str, what: str, least: float) -> None:
    """In float32 the first finds the image at 120 dB, the second at 48; rounded models lose more of small updates."""
    done = federate(smooth(1, (1, 20, 20), labels=1, seed=3))
    (seen,) = done.capture.observations
    if what == "update":
        half = replace(seen, returned=add(seen.sent, {key: value.half() for key, value in seen.update.items()}))
    else:
        sent, returned = ({key: value.half() for key, value in state.items()} for state in (seen.sent, seen.returned))
        half = replace(seen, sent=sent if what == "both models" else seen.sent, returned=returned)
    claim = one(attack(name, iterations=150)(replace(done.capture, observations=(half,))))
    assert claim.images.dtype == torch.float32
    assert psnr(claim.images, done.used.images).item() >= least


@pytest.mark.parametrize("name", SEARCHES)
def test_volumes_and_colours_fit(federate: Make, smooth: Make, name: str) -> None:
    recipe = LocalRecipe(lr=0.02, batch_size=2, steps=1)
    for shape in ((1, 6, 5, 7), (3, 6, 8)):
        done = federate(smooth(2, shape), recipe=recipe, public=smooth(3, shape, seed=9))
        claim = one(attack(name, iterations=3)(done.capture))
        assert claim.images.shape == (2, *shape)
        assert bool(torch.isfinite(claim.images).all())


def problems(capture: Any, search: MatchingAttack, device: str) -> tuple[Problems, Tensor]:
    """Two updates with two restarts each, and their trials a little away from the start."""
    rng = torch.Generator().manual_seed(0)
    where = torch.device(device)
    group = [gather(capture, seen, rng=rng, device=where, max_steps=9, max_images=9, who="test") for seen in capture.observations]
    plan = search.plan(group[0], capture, rng=rng)
    labels = torch.stack([evidence.labels for evidence in group for _ in range(2)])
    shape = (labels.shape[1], *capture.task.shape)
    images = [plan.start(shape, rng).to(where) for _ in labels]
    trials = torch.stack([plan.space.encode(image, given) for image, given in zip(images, labels, strict=True)])
    made = assemble(group, labels, plan)
    return replace(made, mean=torch.rand((4, *shape), generator=rng).to(where)), trials


@pytest.fixture
def two_updates(federate: Make, smooth: Make, shallow: str) -> Callable[[bool], Any]:
    """Two sites that took two steps from the same trained model with batch normalisation."""

    def make(train_mode: bool) -> Any:
        recipe = LocalRecipe(lr=0.05, batch_size=2, steps=2, momentum=0.5, weight_decay=1e-3, train_mode=train_mode)
        parts = [
            federate(smooth(4, seed=seed), recipe=recipe, model=shallow, public=smooth(6, seed=9), before=smooth(16, seed=8))
            for seed in (1, 2)
        ]
        seen = [replace(part.capture.observations[0], node=node) for node, part in enumerate(parts)]
        return replace(parts[0].capture, observations=tuple(seen))

    return make


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("train_mode", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", SEARCHES)
def test_many_at_once_are_the_same_as_one_by_one(
    two_updates: Callable[[bool], Any], name: str, train_mode: bool, device: str
) -> None:
    """The way a GPU computes, compared with the way a CPU does."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    search = attack(name, **({"bn": 0.5} if name == "see-through-gradients" else {}))
    capture = two_updates(train_mode)
    one_by_one, trials = problems(capture, search, "cpu")
    at_once, there = problems(capture, search, device)
    rows = torch.arange(4)
    values, slopes = replace(one_by_one, batched=False)(trials, rows)
    batched_values, batched_slopes = replace(at_once, batched=True)(there, rows.to(device))
    assert len({value.item() for value in values}) == 4
    close = 1e-4 if device == "cpu" else 1e-2
    assert torch.allclose(batched_values.cpu(), values, rtol=close)
    assert (batched_slopes.cpu() - slopes).norm() <= close * slopes.norm()


@pytest.mark.parametrize("name", ["modern-inverting-gradients", "see-through-gradients", "bn-aware", "cpl"])
def test_each_update_is_told_its_own(two_updates: Callable[[bool], Any], name: str) -> None:
    """Two updates searched together get what each gets alone: hints do not spill over."""
    capture = two_updates(True)
    together, trials = problems(capture, attack(name), "cpu")
    for place, seen in enumerate(capture.observations):
        alone, _ = problems(replace(capture, observations=(seen,)), attack(name), "cpu")
        rows = torch.tensor([2 * place, 2 * place + 1])
        mean = None if together.mean is None else together.mean[rows]
        values, _ = replace(alone, mean=mean)(trials[rows], torch.arange(2))
        assert torch.allclose(values, together(trials[rows], rows)[0], rtol=1e-5)
