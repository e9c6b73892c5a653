"""What one site answers, and what it writes beside the run."""

from __future__ import annotations

import json
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from sklearn import metrics as reference
from torch import Tensor
from torch.nn import functional

from flpriv import data
from flpriv.scenario import Scenario
from flpriv.state import parameters
from flpriv.witness import read_witnesses

Make = Callable[..., Scenario]
Ask = Callable[..., Message]

PLUGINS = '''
from dataclasses import dataclass
from typing import ClassVar
import torch
from flpriv.attack import Attack
from flpriv.defense import Defense, Refusal
from flpriv.threat import Can

@dataclass(frozen=True, kw_only=True)
class Halve(Defense):
    """Halve the update."""
    name = "halve"
    acts_on = "update"
    def prepare(self, loop, *, local):
        local.notes["site"] = local.site
        return loop
    def protect(self, update, *, local):
        local.notes["random"] = float(torch.rand((), generator=local.rng))
        return {key: value / 2 for key, value in update.items()}

@dataclass(frozen=True, kw_only=True)
class Spoil(Defense):
    """Return NaN."""
    name = "spoil"
    acts_on = "update"
    def protect(self, update, *, local):
        return {key: value * float("nan") for key, value in update.items()}

@dataclass(frozen=True, kw_only=True)
class Refuse(Defense):
    """Take no part."""
    name = "refuse"
    acts_on = "received"
    def inspect(self, received, *, local):
        return Refusal(reason="not today")

@dataclass(frozen=True, kw_only=True)
class Break(Defense):
    """Fail with a text that must not leave."""
    name = "break"
    acts_on = "loop"
    def prepare(self, loop, *, local):
        raise ValueError(f"/data/secret/{local.records().ids[0]}.png")

class Wrapped(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner, self.scale = inner, torch.nn.Parameter(torch.rand(1))
    def forward(self, x):
        return self.inner(x) * self.scale

@dataclass(frozen=True, kw_only=True)
class Wrap(Defense):
    """Change the model that all agree on."""
    name = "wrap"
    acts_on = "loop"
    def architecture(self, model):
        return Wrapped(model)

@dataclass(frozen=True, kw_only=True)
class Ship(Attack):
    """Ship another model definition."""
    name = "ship"
    goal = "reconstruction"
    needs = Can.TAMPER
    paper = ""
    times: int = 1
    def run(self, capture, *, rng):
        return []
    def architecture(self, model, task):
        for _ in range(self.times):
            model = Wrapped(model)
        return model
'''


@pytest.fixture
def defended(scenario: Make, tmp_path: Path) -> Make:
    """A scenario with toy defences and an attack that ships a model definition."""
    file = tmp_path / "toys.py"
    file.write_text(PLUGINS)
    names = ("halve", "spoil", "refuse", "break", "wrap")
    attacks = {"twice": {"attack": "ship", "times": 2}}
    return lambda **tables: scenario(plugins=[str(file)], defenses={name: {} for name in names}, attacks=attacks, **tables)


def initial(scenario: Scenario, seed: int = 0) -> dict[str, Tensor]:
    return dict(data.task(scenario).build(seed=seed).state_dict())


def arrays(reply: Message) -> dict[str, Tensor]:
    assert not reply.has_error(), reply.error
    return dict(reply.content.array_records["arrays"].to_torch_state_dict())


def one_step(**local: Any) -> dict[str, Any]:
    return {"local": {"steps": 1, "batch_size": 4, "lr": 0.1, **local}}


@pytest.mark.parametrize("train_mode", [True, False])
@pytest.mark.parametrize("loss", ["cross-entropy", "balanced-cross-entropy"])
def test_the_witness_explains_the_update_exactly(scenario: Make, ask: Ask, tmp_path: Path, loss: str, train_mode: bool) -> None:
    made = scenario(federation=one_step(loss=loss, train_mode=train_mode))
    state = initial(made)
    returned = arrays(ask(made, state, site=1, rounds=(1, 2)))
    witness = read_witnesses(tmp_path / "out")[1]
    assert (witness.site, witness.round, len(witness.steps), witness.refused) == ("clinic 1", 2, 1, None)
    records = data.records(made, 1, "train")
    rows = [records.ids.index(id) for id in witness.steps[0]]
    weights = torch.tensor([10 / (2 * 6), 10 / (2 * 4)]) if loss.startswith("balanced") else torch.ones(2)
    model = data.task(made).build()
    images, labels = records.images[rows], records.labels[rows]
    each = functional.cross_entropy(model(images), labels, reduction="none") * weights[labels]
    gradients = torch.autograd.grad(each.mean(), list(model.parameters()))
    for (key, before), gradient in zip(parameters(state).items(), gradients, strict=True):
        torch.testing.assert_close(returned[key], before - 0.1 * gradient, rtol=0, atol=1e-7)


def test_every_epoch_uses_every_record_once(scenario: Make, ask: Ask, tmp_path: Path) -> None:
    made = scenario(federation={"local": {"epochs": 2, "batch_size": 4}})
    reply = ask(made, initial(made))
    (witness,) = read_witnesses(tmp_path / "out")
    sizes = [len(step) for step in witness.steps]
    ids = [id for step in witness.steps for id in step]
    assert sizes == [4, 4, 2, 4, 4, 2]
    assert set(ids[:10]) == set(ids[10:]) == set(data.records(made, 0, "train").ids) == set(witness.used)
    assert ids[:10] != ids[10:]
    assert reply.content["metrics"]["num-examples"] == 10


def test_steps_may_go_beyond_an_epoch(scenario: Make, ask: Ask, tmp_path: Path) -> None:
    made = scenario(federation={"local": {"steps": 5, "batch_size": 8, "optimizer": "adam", "lr": 0.001}})
    ask(made, initial(made))
    assert [len(step) for step in read_witnesses(tmp_path / "out")[0].steps] == [8, 2, 8, 2, 8]


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(scenario: Make, ask: Ask) -> None:
    tables: dict[str, Any] = {"model": {"name": "dropping"}, "federation": {"local": {"batch_size": 10, "epochs": 2}}}
    state = initial(scenario(**tables))
    torch.manual_seed(1)
    first = arrays(ask(scenario(**tables), state))
    torch.manual_seed(2)
    again, other = arrays(ask(scenario(**tables), state)), arrays(ask(scenario(**tables, seed=1), state))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not all(torch.equal(first[key], other[key]) for key in first)


def test_defended_and_undefended_see_the_same_batches(defended: Make, ask: Ask, tmp_path: Path) -> None:
    made = defended(federation=one_step())
    state = initial(made)
    bare = arrays(ask(made, state))
    plain = read_witnesses(tmp_path / "out")[0]
    halved = arrays(ask(made, state, setting="halve"))
    witness = read_witnesses(tmp_path / "out")[0]
    assert witness.steps == plain.steps
    assert witness.notes["halve"]["site"] == "clinic 0" and 0 < float(witness.notes["halve"]["random"]) < 1
    for key in state:
        torch.testing.assert_close(halved[key] - state[key], (bare[key] - state[key]) / 2, rtol=1e-4, atol=1e-7)


def test_a_defence_draws_the_same_noise_again(defended: Make, ask: Ask, tmp_path: Path) -> None:
    made, drawn = defended(federation=one_step()), []
    for number in (1, 1, 2):
        ask(made, initial(made), setting="halve", rounds=(number,))
        drawn.append(read_witnesses(tmp_path / "out")[-1].notes["halve"]["random"])
    assert drawn[0] == drawn[1] != drawn[2]


def test_noise_follows_from_a_seed_of_the_sites_own_where_it_has_one(defended: Make, ask: Ask, tmp_path: Path) -> None:
    made, drawn = defended(federation=one_step()), []
    for own in ({}, {"defense-seed": 5}, {"defense-seed": 6}, {"defense-seed": 5}):
        ask(made, initial(made), setting="halve", node_config=own)
        drawn.append(read_witnesses(tmp_path / "out")[-1].notes["halve"]["random"])
    assert len(set(drawn)) == 3
    assert drawn[1] == drawn[3]


def test_a_refusal_is_witnessed(defended: Make, ask: Ask, tmp_path: Path) -> None:
    made = defended()
    reply = ask(made, initial(made), setting="refuse")
    (witness,) = read_witnesses(tmp_path / "out")
    assert reply.error.reason == witness.refused == "refuse: not today"
    assert witness.steps == ()


@pytest.mark.parametrize(
    ("setting", "local", "sent"),
    [
        ("none", {"lr": 1e30}, "round 3: the update: layer 'conv1.weight' holds NaN or infinite values"),
        ("spoil", {}, "round 3: the defended update: layer 'conv1.weight' holds NaN or infinite values"),
    ],
)
def test_a_nan_update_names_layer_and_round(
    defended: Make, ask: Ask, tmp_path: Path, setting: str, local: dict[str, Any], sent: str
) -> None:
    made = defended(federation={"local": {"epochs": 3, **local}})
    reply = ask(made, initial(made), setting=setting, rounds=(3,))
    assert reply.error.reason is not None and reply.error.reason.startswith(sent)
    assert read_witnesses(tmp_path / "out") == []


def test_errors_leave_without_paths_ids_and_names(defended: Make, ask: Ask, tmp_path: Path) -> None:
    made = defended()
    reply = ask(made, initial(made), setting="break", rounds=(2,))
    assert reply.error.reason == "round 2: ValueError; see the site's own log"
    log = tmp_path / "out" / "witness" / "site-0000" / "log.txt"
    assert "/data/secret/0-0.png" in log.read_text()
    assert stat.S_IMODE(log.stat().st_mode) == 0o600


def test_an_unreadable_image_is_told_to_the_site_alone(scenario: Make, ask: Ask) -> None:
    made = scenario(sites={"unreadable": "0-3"})
    reason = str(ask(made, initial(scenario())).error.reason)
    assert "secret" not in reason and "0-3" not in reason and "clinic" not in reason


@pytest.mark.parametrize("kind", ["train", "evaluate"])
def test_a_model_that_does_not_fit_is_refused_by_layer(scenario: Make, ask: Ask, kind: str) -> None:
    made = scenario()
    reply = ask(made, {**initial(made), "fc.bias": torch.zeros(5)}, kind=kind)
    assert reply.error.reason == "round 1: the model received: layer 'fc.bias' has shape (5,), expected (2,)"


def test_a_defence_of_a_plugin_file_changes_the_agreed_model(defended: Make, ask: Ask) -> None:
    made = defended()
    state = dict(data.task(made, ("wrap",)).build().state_dict())
    assert "scale" in state and data.task(made).plugins == ()
    assert list(arrays(ask(made, state, setting="wrap"))) == list(state)
    assert "layer 'conv1.bias' is missing" in str(ask(made, state).error.reason)


def test_the_model_definition_that_an_attack_ships_is_built(defended: Make, ask: Ask) -> None:
    made = defended(federation=one_step())
    state = {f"inner.inner.{key}": value for key, value in initial(made).items()}
    state |= {"scale": torch.ones(1), "inner.scale": torch.ones(1)}
    returned = arrays(ask(made, state, config={"architecture": "twice"}))
    bare = arrays(ask(made, initial(made)))
    assert set(returned) == set(state)
    for key, value in bare.items():
        torch.testing.assert_close(returned[f"inner.inner.{key}"], value)
    assert ask(made, state, config={"architecture": "thrice"}).error.reason == "round 1: ScenarioError; see the site's own log"


def test_files_are_private(scenario: Make, ask: Ask, tmp_path: Path) -> None:
    ask(made := scenario(), initial(made))
    file = tmp_path / "out" / "witness" / "site-0000" / "round-0001.json"
    assert set(json.loads(file.read_text())) == {"site", "node", "round", "steps", "notes", "refused"}
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(file.parent.stat().st_mode) == 0o700


def test_nothing_but_the_update_and_numbers_is_sent(scenario: Make, ask: Ask) -> None:
    made = scenario()
    reply = ask(made, initial(made))
    assert set(reply.content) == {"arrays", "metrics"}
    assert set(reply.content["metrics"]) == {"num-examples", "loss"}
    assert list(reply.content["arrays"]) == list(initial(made))


def test_evaluation_agrees_with_scikit_learn(scenario: Make, ask: Ask) -> None:
    made = scenario(sites={"test": 20}, model={"name": "cnn", "width": 4, "mean": 0.3, "std": 0.2})
    state = initial(made, seed=3)
    found: Any = ask(made, state, kind="evaluate").content["metrics"]
    records, model = data.records(made, 0, "test"), data.task(made).build()
    model.load_state_dict(state)
    with torch.no_grad():
        logits = model(records.images)
    truth, predicted = records.labels.numpy(), logits.argmax(1).numpy()
    assert found["num-examples"] == 20
    assert np.isclose(found["loss"], reference.log_loss(truth, logits.double().softmax(1).numpy()), atol=1e-6)
    assert np.isclose(found["accuracy"], reference.accuracy_score(truth, predicted))
    assert np.isclose(found["balanced-accuracy"], reference.balanced_accuracy_score(truth, predicted))


def test_a_site_without_test_records_says_so(scenario: Make, ask: Ask) -> None:
    made = scenario(sites={"test": 0})
    reply = ask(made, initial(made), kind="evaluate")
    assert reply.error.reason == "round 1: this site has no test records"


def test_the_proximal_term_draws_back(scenario: Make, ask: Ask) -> None:
    made = scenario(federation={"local": {"steps": 4, "batch_size": 10, "lr": 0.1}})
    state = initial(made)

    def moved(mu: float) -> float:
        returned = arrays(ask(made, state, config={"proximal-mu": mu}))
        return float(sum((returned[key] - state[key]).square().sum() for key in state))

    assert moved(5.0) < moved(1.0) < moved(0.0)
