"""DP-SGD against its own definition, Opacus' accountant and plain training."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from opacus.accountants import PRVAccountant, RDPAccountant
from torch import nn
from torch.nn.functional import cross_entropy

from flpriv.defenses.dp_sgd import DPSGD
from flpriv.errors import RunError, ScenarioError
from flpriv.task import Task

from .conftest import Loops, Surroundings, train


def small(*, norm: bool = False) -> nn.Module:
    torch.manual_seed(0)
    middle: list[nn.Module] = [nn.BatchNorm2d(4)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *middle, nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(256, 2))


def agreed(defense: DPSGD) -> nn.Module:
    return defense.architecture(small())


def test_without_noise_and_with_a_large_norm_it_is_plain_training(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=0, max_grad_norm=1e6, poisson=False)
    model = agreed(defense)
    plain = loop(copy.deepcopy(model))
    private = defense.prepare(loop(model), local=local())
    losses = [loss for _, loss in train(plain)]
    assert [loss for _, loss in train(private)] == pytest.approx(losses, abs=1e-5)
    for one, other in zip(plain.model.parameters(), private.model.parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-6)


def test_one_step_is_the_clipped_sum_over_the_expected_batch(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=0, max_grad_norm=0.05, poisson=False)
    model = agreed(defense)
    before = copy.deepcopy(model)
    private = defense.prepare(loop(model, records=4), local=local())
    images, labels, _ = next(iter(private.loader))
    total = [torch.zeros_like(p) for p in before.parameters()]
    for image, label in zip(images, labels, strict=True):
        grads = torch.autograd.grad(cross_entropy(before(image[None]), label[None]), list(before.parameters()))
        length = torch.cat([g.flatten() for g in grads]).norm()
        assert length > 0.05
        for place, grad in enumerate(grads):
            total[place] += grad * (0.05 / length)
    list(train(private))
    for old, new, grad in zip(before.parameters(), model.parameters(), total, strict=True):
        assert torch.allclose(new, old - 0.1 * grad / 4, atol=1e-6)


def test_noise_has_the_stated_scale(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=2.0, max_grad_norm=1e-6, poisson=False)
    model = agreed(defense)
    before = copy.deepcopy(model)
    list(train(defense.prepare(loop(model, records=4, lr=1.0), local=local())))
    moved = torch.cat([(a - b).flatten() for a, b in zip(model.parameters(), before.parameters(), strict=True)])
    assert float(moved.detach().std() * 4 / 1e-6) == pytest.approx(2.0, rel=0.15)


def test_epsilon_is_opacus_own_across_rounds_and_a_restart(loop: Loops, local: Surroundings, tmp_path: Path) -> None:
    books = RDPAccountant()
    for number in (1, 2, 3):
        defense = DPSGD(noise_multiplier=1.1)
        here = local(number, seed=number)
        list(train(defense.prepare(loop(agreed(defense)), local=here)))
        for _ in range(6):
            books.step(noise_multiplier=1.1, sample_rate=4 / 24)
        assert here.notes["epsilon"] == pytest.approx(books.get_epsilon(delta=1e-5), rel=1e-9)
    assert len(json.loads((tmp_path / "privacy-dp-sgd.json").read_text())) == 3


def test_prv_accountant(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=2.0, accountant="prv")
    here = local()
    list(train(defense.prepare(loop(agreed(defense)), local=here)))
    books = PRVAccountant()
    books.history = [(2.0, 4 / 24, 6)]
    assert here.notes["epsilon"] == pytest.approx(books.get_epsilon(delta=1e-5), rel=1e-6)


def test_a_redone_round_counts_once_and_another_model_in_it_again(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD()

    def spent(model: nn.Module) -> float:
        here = local(1)
        list(train(defense.prepare(loop(model), local=here)))
        return float(here.notes["epsilon"])

    first = spent(agreed(defense))
    assert spent(agreed(defense)) == first
    other = agreed(defense)
    torch.nn.init.normal_(next(other.parameters()))
    assert spent(other) > first


def test_without_a_folder_every_round_counts_as_this_one(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD()
    here = local(3, folder=None)
    list(train(defense.prepare(loop(agreed(defense)), local=here)))
    books = RDPAccountant()
    books.history = [(1.0, 4 / 24, 18)]
    assert here.notes["epsilon"] == pytest.approx(books.get_epsilon(delta=1e-5))


def test_a_broken_ledger_stops_the_round(loop: Loops, local: Surroundings, tmp_path: Path) -> None:
    (tmp_path / "privacy-dp-sgd.json").write_text("{")
    defense = DPSGD()
    with pytest.raises(RunError, match=r"privacy-dp-sgd\.json"):
        list(train(defense.prepare(loop(agreed(defense)), local=local())))


def test_zero_noise_claims_nothing(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=0)
    here = local()
    list(train(defense.prepare(loop(agreed(defense)), local=here)))
    assert "epsilon" not in here.notes and "none" in str(here.notes["privacy"])


def test_poisson_draws_vary_and_empty_batches_are_stepped_on(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD(noise_multiplier=1.0)
    model = agreed(defense)
    private = defense.prepare(loop(model, records=40, batch=1), local=local())
    sizes, moved = [], []
    last = [p.detach().clone() for p in model.parameters()]
    for rows, loss in train(private):
        assert torch.isfinite(torch.tensor(loss))
        moved.append(any(not torch.equal(a, b) for a, b in zip(last, model.parameters(), strict=True)))
        last = [p.detach().clone() for p in model.parameters()]
        sizes.append(len(rows))
    assert len(sizes) == 40 and 0 in sizes and max(sizes) > 1
    assert all(moved)
    assert all(torch.isfinite(p).all() for p in model.parameters())


def test_the_model_comes_back_bare_and_the_run_is_seeded(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD()
    states: list[torch.Tensor] = []
    for seed in (1, 1, 2):
        model = agreed(defense)
        keys = list(model.state_dict())
        private = defense.prepare(loop(model), local=local(seed=seed))
        assert private.model is model
        torch.manual_seed(seed + len(states))
        list(train(private))
        assert list(model.state_dict()) == keys
        assert not any(hasattr(p, "grad_sample") for p in model.parameters())
        states.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(states[0], states[1])
    assert not torch.equal(states[0], states[2])


def test_eval_mode_recipes_train_too(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Dropout(0.5), nn.Linear(8, 2))
    still = loop(model)
    model.eval()
    private = defense.prepare(still, local=local())
    assert not model[2].training
    assert len(list(train(private))) == 6


def test_architecture_replaces_batch_norm_and_an_unagreed_model_is_refused(loop: Loops, local: Surroundings) -> None:
    defense = DPSGD()
    fixed = defense.architecture(small(norm=True))
    layers = dict(fixed.named_children())
    assert isinstance(layers["1"], nn.GroupNorm)
    assert not getattr(layers["2"], "inplace", True)
    list(train(defense.prepare(loop(fixed), local=local())))
    with pytest.raises(ScenarioError, match=r"layer '1' \(BatchNorm2d\)"):
        defense.prepare(loop(small(norm=True)), local=local())


@pytest.mark.parametrize(
    ("model", "options", "side"),
    [("cnn", {}, 16), ("lenet", {}, 16), ("resnet18", {"widen": 0.25}, 16), ("densenet121", {"dropout": 0.1}, 32)],
)
@pytest.mark.parametrize("dims", [2, 3])
def test_the_shipped_models_train(
    model: str, options: dict[str, float], side: int, dims: int, loop: Loops, local: Surroundings
) -> None:
    shape = (1, *[side] * dims)
    agreed = Task(
        modality="ct", shape=shape, classes=("a", "b"), model=model, options=options, mean=0.5, std=0.2, changes=(("dp-sgd", {}),)
    )
    built = agreed.build()
    before = {key: value.clone() for key, value in built.state_dict().items()}
    list(train(DPSGD().prepare(loop(built, shape=shape, records=4, batch=2), local=local())))
    after = built.state_dict()
    assert list(after) == list(before)
    assert all(torch.isfinite(value).all() for value in after.values())
    assert any(not torch.equal(after[key], before[key]) for key in before)
