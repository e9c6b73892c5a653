from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from flpriv.attacks.site.property_inference import PropertyInference, features, local_update
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Property
from flpriv.clients.training import train
from flpriv.errors import CaptureError, ScenarioError
from flpriv.measures import measure
from flpriv.measures.membership import null_error
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import Can
from flpriv.truth import Truth

TASK = Task(modality="xray", shape=(1, 12, 12), classes=("a", "b"), model="cnn", options={"width": 4})
FED_SGD = LocalRecipe(lr=0.1, batch_size=16, steps=1)


def people(count: int, *, seed: int, mark: float) -> Records:
    """Noise; images of women are brighter in a corner by ``mark``. Labels know nothing of it."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.rand(count, *TASK.shape, generator=rng) * 0.5
    women = torch.rand(count, generator=rng) < 0.5
    images[women, :, :5, :5] += mark
    labels = torch.randint(2, (count,), generator=rng)
    return Records(images=images, labels=labels, attributes={"sex": tuple("F" if w else "M" for w in women.tolist())})


def federation(*, mark: float, rounds: int = 10) -> tuple[Capture, Truth]:
    """Two sites that take one step a round on batches of 16 of women, then of men."""
    state = {key: value.clone() for key, value in TASK.build(seed=1).state_dict().items()}
    seen, used = [], {}
    for round in range(1, rounds + 1):
        for node in (5, 6):
            pool = people(64, seed=1000 * round + node, mark=mark)
            women = torch.tensor([sex == "F" for sex in pool.attributes["sex"]])
            order = torch.argsort(women, descending=(round + node) % 2 == 0, stable=True)
            batch = pool.take(order[:16])
            model = TASK.build()
            update = local_update(model, state, batch, FED_SGD, 2, torch.Generator().manual_seed(round))
            returned = {key: value + update[key] for key, value in state.items()}
            seen.append(Observation(round=round, node=node, sent=state, returned=returned, examples=64, local=FED_SGD))
            used[round, node] = batch
        state = {key: (seen[-1].returned[key] + seen[-2].returned[key]) / 2 for key in state}
    granted = Can.SEE_UPDATES | Can.KNOW_LOCAL | Can.KNOW_EXPOSED
    capture = Capture(granted=granted, task=TASK, observations=tuple(seen), exposed=people(80, seed=1, mark=mark))
    return capture, Truth(used=used, site_of={5: "east", 6: "west"})


def claims(capture: Capture, attack: PropertyInference | None = None) -> list[Property]:
    made = (attack or PropertyInference(updates=30))(capture)
    found = [claim for claim in made if isinstance(claim, Property)]
    assert len(found) == len(made)
    return found


def area(capture: Capture, truth: Truth) -> float:
    found = measure(claims(capture), truth, attack="a", name="b", goal=Goal.ATTRIBUTE, setting="none", defense="none")
    assert found[0].headline is not None
    assert found[0].headline.value is not None
    return found[0].headline.value


@pytest.fixture(scope="module")
def marked() -> tuple[Capture, Truth]:
    return federation(mark=0.5)


def test_a_property_that_shows_is_told(marked: tuple[Capture, Truth]) -> None:
    capture, truth = marked
    assert area(capture, truth) > 0.8
    found = claims(capture)
    assert [(claim.round, claim.node) for claim in found] == [(o.round, o.node) for o in capture.observations]
    assert {(claim.property, claim.share) for claim in found} == {("sex=F", 0.5)}
    assert len(claims(capture, PropertyInference(spread=3, updates=20))) == 6


def test_a_property_that_does_not_show_is_not_told() -> None:
    assert abs(area(*federation(mark=0.0)) - 0.5) <= 2 * null_error(10, 10)


def test_noise_for_updates_tells_nothing(marked: tuple[Capture, Truth]) -> None:
    capture, truth = marked
    rng = torch.Generator().manual_seed(0)

    def blind(seen: Observation) -> Observation:
        noise = {key: value + 0.01 * torch.randn(value.shape, generator=rng) for key, value in seen.sent.items()}
        return replace(seen, returned=noise)

    assert abs(area(replace(capture, observations=tuple(map(blind, capture.observations))), truth) - 0.5) <= 2 * null_error(
        10, 10
    )


@pytest.mark.parametrize(
    "recipe",
    [
        FED_SGD,
        LocalRecipe(lr=0.05, momentum=0.9, weight_decay=0.01, batch_size=16, steps=2, loss="balanced-cross-entropy"),
        LocalRecipe(optimizer="adam", lr=0.01, batch_size=16, epochs=2),
    ],
)
def test_simulated_updates_are_those_of_a_site(recipe: LocalRecipe) -> None:
    records = people(16, seed=3, mark=0.2)
    state = {key: value.clone() for key, value in TASK.build(seed=2).state_dict().items()}
    model = TASK.build()
    model.load_state_dict(state)
    train(model, records, recipe, classes=2, seed=0)
    expected = {key: value - state[key] for key, value in model.state_dict().items()}
    found = local_update(TASK.build(), state, records, recipe, 2, torch.Generator().manual_seed(0))
    for key, value in expected.items():
        assert torch.allclose(found[key], value, atol=1e-5)


def test_features_are_the_largest_of_each_kernel() -> None:
    kernel = torch.tensor([[[[1.0, -6.0]], [[2.0, 0.0]]]])
    found = features({"conv": kernel, "bias": torch.tensor([-3.0])}, width=8)
    assert torch.allclose(found, torch.tensor([6.0, 2.0, 3.0]) / 7)
    assert features({"dense": torch.arange(100.0).view(10, 10)}, width=4).shape == (4,)


def test_it_says_what_it_lacks(marked: tuple[Capture, Truth]) -> None:
    capture, _ = marked
    with pytest.raises(CaptureError, match="no exposed records"):
        claims(replace(capture, exposed=None))
    with pytest.raises(CaptureError, match="0 exposed records have 'age>=60'"):
        claims(capture, PropertyInference(property="age>=60"))
    sums = tuple(replace(o, node=None) for o in capture.observations)
    with pytest.raises(CaptureError, match="no reply of a single node"):
        claims(replace(capture, observations=sums))
    with pytest.raises(ScenarioError, match="not a number"):
        claims(capture, PropertyInference(property="age>=old"))
