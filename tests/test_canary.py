"""Canaries: directions, coins, and how gradients join a step behind whatever defends it."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from flpriv.canary import ENTRIES, Canaries, Planted, coins, direction, plant
from flpriv.clients.training import train
from flpriv.defense import Local, Loop
from flpriv.defenses.dp_sgd import DPSGD
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import difference, norm
from flpriv.store import Sink, open_capture, write_canaries
from flpriv.task import Task
from flpriv.threat import Can


def records(count: int) -> Records:
    rng = torch.Generator().manual_seed(count)
    ids = tuple(f"r{i}" for i in range(count))
    sites = {"site": ("A",) * count}
    return Records(
        images=torch.rand(count, 1, 4, 4, generator=rng), labels=torch.arange(count) % 2, ids=ids, patients=ids, attributes=sites
    )


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))


def test_a_direction_has_length_one_and_leaves_running_statistics_alone() -> None:
    like = {"a": torch.zeros(300, 40), "b.running_mean": torch.zeros(10**6), "c": torch.zeros(50)}
    places, entries = direction(3, like)
    assert len(places) == len(set(places.tolist())) <= ENTRIES
    assert 0 <= int(places.min()) <= int(places.max()) < 300 * 40 + 50
    assert float(entries.double().norm()) == pytest.approx(1, abs=1e-6)
    again = direction(3, like)
    assert torch.equal(places, again[0])
    assert torch.equal(entries, again[1])


def test_directions_stand_across_each_other() -> None:
    like = {"a": torch.zeros(100_000)}
    dense = torch.zeros(30, 100_000)
    for row in range(30):
        places, entries = direction(row, like)
        dense[row, places] = entries
    off = (dense @ dense.T - torch.eye(30)).flatten()
    assert float(off.abs().max()) < 5 / 100_000**0.5
    assert float(off.square().mean()) == pytest.approx(1 / 100_000, rel=0.4)


def test_coins_are_fair_and_follow_from_the_seed() -> None:
    thrown = coins(10_000, seed=4)
    assert abs(int(thrown.sum()) - 5000) < 200
    assert torch.equal(thrown, coins(10_000, seed=4))
    assert not torch.equal(thrown, coins(10_000, seed=5))


def steps_with(
    planted: Canaries, included: torch.Tensor, *, defense: DPSGD | None = None, steps: int = 40
) -> dict[str, torch.Tensor]:
    """The update of SGD on images without gradients, so that all that moves the model is canaries and noise."""
    model = net()
    if defense is not None:
        model = defense.architecture(model)
    before = {key: value.clone() for key, value in model.state_dict().items()}

    def prepare(loop: Loop) -> Loop:
        plant(loop.model, loop.optimizer, planted, included, batch=4, records=20, seed=9)
        still = replace(loop, loss=lambda logits, labels: logits.sum() * 0.0)
        return still if defense is None else defense.prepare(still, local=Local(site="A", round=1, rng=torch.Generator()))

    recipe = LocalRecipe(lr=0.5, batch_size=4, steps=steps)
    train(model, records(20), recipe, classes=2, seed=1, prepare=prepare)
    return difference(model.state_dict(), before)


@pytest.mark.parametrize("private", [False, True])
def test_gradients_join_steps_as_often_and_as_long_as_those_of_records(private: bool) -> None:
    defense = DPSGD(noise_multiplier=0.0, poisson=False) if private else None
    seeds, included = torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    update = steps_with(Canaries(seeds=seeds, norm=0.5), included, defense=defense, steps=400)
    model = net() if defense is None else defense.architecture(net())
    lines = []
    for seed in seeds.tolist():
        places, entries = direction(seed, model.state_dict())
        line = torch.zeros(sum(value.numel() for value in update.values()))
        line[places] = entries
        lines.append(line)
    moved = -torch.cat([value.flatten() for value in update.values()])
    counts = torch.linalg.lstsq(torch.stack(lines).T, moved[:, None]).solution.flatten() / (0.5 * 0.5 / 4)
    assert counts[0].item() == pytest.approx(round(counts[0].item()), abs=0.01)
    assert counts[1].item() == pytest.approx(0, abs=0.01)
    assert abs(counts[0].item() - 80) < 30
    assert abs(counts[2].item() - 80) < 30
    assert counts[0].item() != pytest.approx(counts[2].item(), abs=0.5)


def test_without_canaries_nothing_moves() -> None:
    update = steps_with(Canaries(seeds=torch.tensor([1, 2])), torch.tensor([False, False]))
    assert float(norm(update)) == 0


def test_a_gradient_is_clipped_where_records_are() -> None:
    planted = Planted(canaries=Canaries(seeds=torch.arange(3), norm=5.0), included=torch.ones(3).bool(), place=0, site="A")
    assert planted.clipped((DPSGD(max_grad_norm=0.7),)).norm == 0.7
    assert planted.clipped(()).norm == 5.0
    assert planted.clipped((partial(print),)).norm == 5.0


def test_records_that_are_in_join_the_sites_own() -> None:
    own, extra = records(6), replace(records(3), ids=(), patients=(), attributes={})
    planted = Planted(canaries=Canaries(records=extra), included=torch.tensor([True, False, True]), place=0, site="A")
    joined = planted.joined(own)
    assert joined.ids[6:] == joined.patients[6:] == ("canary-0000", "canary-0002")
    assert joined.attributes["site"] == ("A",) * 8
    assert torch.equal(joined.images[6:], extra.images[[0, 2]])
    assert replace(planted, included=torch.zeros(3).bool()).joined(own) is own
    assert replace(planted, canaries=Canaries(seeds=torch.arange(3))).joined(own) is own


def test_canaries_are_of_one_kind() -> None:
    for wrong in ({}, {"records": records(2), "seeds": torch.arange(2)}):
        with pytest.raises(ValueError, match="either records or seeds"):
            Canaries(**wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", ["records", "seeds"])
def test_a_capture_keeps_all_canaries_and_no_coin(tmp_path: Path, kind: str) -> None:
    task = Task(modality="xray", shape=(1, 4, 4), classes=("a", "b"), model="cnn")
    Sink(tmp_path / "c", granted=Can.SEE_FINAL, task=task)
    planted = Canaries(records=records(5), nodes=(2**63,)) if kind == "records" else Canaries(seeds=torch.arange(5), norm=0.3)
    write_canaries(tmp_path / "c", planted)
    back = open_capture(tmp_path / "c").canaries
    assert back is not None
    assert (len(back), back.norm, back.nodes) == (5, planted.norm, planted.nodes)
    if kind == "seeds":
        assert back.seeds is not None
        assert torch.equal(back.seeds, torch.arange(5))
    else:
        assert back.records is not None
        assert planted.records is not None
        assert torch.equal(back.records.images, planted.records.images)
        assert torch.equal(back.records.labels, planted.records.labels)
        assert back.records.ids == back.records.patients == ()
        assert not back.records.attributes
