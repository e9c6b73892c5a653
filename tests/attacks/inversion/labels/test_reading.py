from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flpriv.attacks.inversion.labels.reading import Reading, course, read
from flpriv.attacks.inversion.unroll import Replay
from flpriv.errors import FlprivError
from flpriv.recipe import LocalRecipe

PLAIN = LocalRecipe(lr=0.1, batch_size=4, steps=1, train_mode=False)
LABELS = torch.tensor([0, 2, 2, 1])


def images(count: int, seed: int = 0) -> Tensor:
    return torch.rand((count, 1, 3, 3), generator=torch.Generator().manual_seed(seed))


def replayed(recipe: LocalRecipe = PLAIN, *, bias: bool = True, batches: tuple[tuple[int, ...], ...] = ((0, 1, 2, 3),)) -> Replay:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(9, 5), nn.Tanh(), nn.Linear(5, 3, bias=bias))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    return Replay(model=model.requires_grad_(False), start=start, rest={}, recipe=recipe, batches=batches)


def reading(site: Replay, *, guesses: Tensor | None = None, guessed: Tensor | None = None) -> Reading:
    guesses = images(6, seed=1) if guesses is None else guesses
    guessed = torch.tensor([0, 0, 1, 1, 2, 2]) if guessed is None else guessed
    return read(site, site(images(4), LABELS), classes=3, guesses=guesses, guessed=guessed)


def wrong(site: Replay) -> Tensor:
    """``mean(p - onehot(y))`` of the site's images, straight from the definition."""
    logits: Tensor = torch.func.functional_call(site.model, dict(site.start), (images(4),))
    return (logits.softmax(1) - F.one_hot(LABELS, 3)).mean(0)


@pytest.mark.parametrize("decay", [0.0, 0.7])
def test_the_gradient_of_one_step_is_what_images_add(decay: float) -> None:
    site = replayed(replace(PLAIN, weight_decay=decay))
    found = reading(site)
    assert torch.allclose(found.mark, wrong(site).double(), atol=1e-6)
    weight = replayed()(images(4), LABELS)[2]
    assert found.gradient.weight is not None
    assert torch.allclose(found.gradient.weight, weight.double(), atol=1e-6)


@pytest.mark.parametrize("recipe", [PLAIN, replace(PLAIN, momentum=0.9), replace(PLAIN, momentum=0.5, weight_decay=0.3)])
def test_many_small_steps_on_the_same_images_have_the_gradient_of_one(recipe: LocalRecipe) -> None:
    many = replayed(replace(recipe, lr=1e-6, steps=5), batches=((0, 1, 2, 3),) * 5)
    assert torch.allclose(reading(many).mark, wrong(many).double(), atol=1e-4)


def test_the_course_leads_from_the_model_sent_to_the_one_returned() -> None:
    site = replayed(replace(PLAIN, steps=3), batches=((0, 1), (2, 3), (0, 2)))
    found = reading(site)
    start, end = found.at(0.0), found.at(1.0)
    assert start.bias is not None and end.bias is not None
    assert torch.equal(start.bias, site.start["3.bias"].double())
    assert torch.allclose(end.bias, (site.start["3.bias"] - 0.1 * site(images(4), LABELS)[3]).double())
    assert not torch.equal(found.answers, found.answers_along)
    assert torch.allclose(found.answers_along.sum(1), torch.ones(6, dtype=torch.float64))


@pytest.mark.parametrize(
    ("steps", "momentum", "expected"),
    [
        (1, 0.9, [(1.0, 0.0)]),
        (2, 0.0, [(0.5, 0.0), (0.5, 0.5)]),
        (2, 0.5, [(0.6, 0.0), (0.4, 0.4)]),
        (4, 0.0, [(0.25, 0.0), (0.25, 0.25), (0.25, 0.5), (0.25, 0.75)]),
    ],
)
def test_course(steps: int, momentum: float, expected: list[tuple[float, float]]) -> None:
    assert [list(one) for one in course(steps, momentum=momentum)] == [pytest.approx(list(one)) for one in expected]


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_long_course_is_looked_at_in_five_places(momentum: float) -> None:
    short = course(40, momentum=momentum)
    assert len(short) == 5
    assert sum(weight for weight, _ in short) == pytest.approx(1)
    places = [place for _, place in short]
    assert places == sorted(places)
    if not momentum:
        assert sum(weight * place for weight, place in short) == pytest.approx(39 / 80)


def test_features_are_what_the_last_layer_receives() -> None:
    site = replayed()
    found = reading(site)
    assert isinstance(site.model, nn.Sequential)
    with torch.no_grad():
        inside = site.model[:3](images(6, seed=1))
    assert found.features is not None
    assert torch.equal(found.features, inside)
    assert torch.allclose(found.answers, site.model[3](inside).softmax(1).double(), atol=1e-6)
    assert not site.model[3]._forward_pre_hooks


def test_a_last_layer_without_bias_is_measured_along_the_features() -> None:
    """Tanh gives features of both signs, so that row sums mean nothing; along the mean feature the mark points right."""
    site = replayed(bias=False)
    mark = reading(site, guesses=images(4), guessed=LABELS).mark
    assert F.cosine_similarity(mark, wrong(site).double(), dim=0) > 0.95


def test_marks_of_a_class_without_guesses_are_those_of_all() -> None:
    found = reading(replayed(), guessed=torch.tensor([0, 0, 0, 0, 0, -1]))
    marks = found.marks(found.answers)
    assert torch.allclose(marks[2] + torch.eye(3)[2], found.answers.mean(0))
    assert torch.allclose(marks.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-9)
    own = (4 * found.answers.mean(0) + found.answers[:5].sum(0)) / 9
    assert torch.allclose(marks[0] + torch.eye(3)[0], own)


def test_heights_weigh_the_guesses() -> None:
    found = reading(replayed(), guessed=torch.full((6,), -1))
    heights = torch.arange(6).double()
    plain = found.answers - torch.eye(3)[1]
    assert torch.allclose(found.marks(found.answers, heights)[1], (heights[:, None] * plain).mean(0))


def test_guesses_make_whole_batches_where_batch_statistics_count() -> None:
    train = replace(PLAIN, train_mode=True)
    assert len(reading(replayed(train)).guesses) == 4
    assert len(reading(replayed()).guesses) == 6
    assert len(reading(replayed(train), guesses=images(3), guessed=torch.arange(3)).guesses) == 3


def test_an_update_that_is_not_finite_is_refused() -> None:
    site = replayed()
    observed = [value * float("nan") for value in site(images(4), LABELS)]
    with pytest.raises(FlprivError, match="NaN"):
        read(site, observed, classes=3, guesses=images(4), guessed=LABELS)
