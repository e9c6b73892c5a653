from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from flpriv.attacks.malicious.loki import Loki
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ThreatError
from flpriv.recipe import LocalRecipe
from flpriv.task import Task
from flpriv.testing import blindfold
from flpriv.threat import Can

Make = Callable[..., Any]

STEP = LocalRecipe(lr=0.05, batch_size=8, steps=1)


def recovered(done: Any, attack: Loki, psnr: Make) -> float:
    """Share of all images that come back at 30 dB or better in a claim about their own node."""
    claims = [claim for claim in attack(done.capture) if isinstance(claim, Reconstruction)]
    assert {claim.node for claim in claims} == set(done.used)
    found = []
    for claim in claims:
        assert claim.confidence is not None and claim.node is not None
        assert claim.confidence.tolist() == sorted(claim.confidence.tolist(), reverse=True)
        found.append(psnr(claim.images, done.used[claim.node].images) >= 30)
    return float(torch.cat(found).double().mean())


@pytest.mark.parametrize("summed", [True, False], ids=["sum", "single replies"])
@pytest.mark.parametrize("model", ["cnn", "resnet18", "flpriv.testing:dense_net"])
@pytest.mark.parametrize("shape", [(1, 20, 20), (3, 12, 16), (1, 8, 10, 12)])
def test_images_come_back_from_their_own_node(
    rounds: Make, parts: Make, smooth: Make, psnr: Make, shape: tuple[int, ...], model: str, summed: bool
) -> None:
    options = {"widen": 0.25} if model == "resnet18" else {}
    options = {"inputs": torch.Size(shape).numel(), "classes": 2} if ":" in model else options
    attack = Loki(bins=64, clients=4)
    done = rounds(
        attack,
        parts(smooth(24, shape, seed=1), (8, 6, 10)),
        recipe=replace(STEP, batch_size=16),
        model=model,
        options=options,
        mean=0.4,
        std=0.2,
        public=smooth(60, shape, seed=2),
        summed=summed,
    )
    assert len(done.capture.observations) == (1 if summed else 3)
    assert recovered(done, attack, psnr) >= 0.9
    assert recovered(replace(done, capture=blindfold(done.capture)), attack, psnr) == 0


def test_a_nodes_columns_of_the_sum_are_its_own_update_times_its_share(rounds: Make, parts: Make, smooth: Make) -> None:
    done = rounds(Loki(bins=16, directions=2, clients=3), parts(smooth(16), (4, 12)), recipe=STEP)
    (total,), pixels = done.capture.observations, 256
    key = next(key for key in total.sent if key.endswith("loki.bins.weight"))
    for place, (own, share) in enumerate(zip(done.replies, (0.25, 0.75), strict=True)):
        columns = [*range(place * pixels, (place + 1) * pixels), 3 * pixels + place]
        others = [column for column in range(own.sent[key].shape[1]) if column not in columns]
        assert own.update[key][:, columns].any()
        assert not own.update[key][:, others].any()
        apart = total.update[key][:, columns] - share * own.update[key][:, columns]
        assert apart.norm() < 1e-3 * share * own.update[key][:, columns].norm()
    assert not total.update[key][:, 2 * pixels : 3 * pixels].any()


@pytest.mark.parametrize("known", [True, False], ids=["public images", "none"])
def test_the_recipe_need_not_be_known(rounds: Make, parts: Make, smooth: Make, psnr: Make, known: bool) -> None:
    attack = Loki(bins=64, clients=2)
    public = smooth(60, seed=2) if known else None
    done = rounds(attack, parts(smooth(16), (8, 8)), recipe=STEP, public=public)
    bare = replace(
        done.capture,
        granted=attack.needs,
        observations=tuple(replace(seen, local=None, defenses=None) for seen in done.capture.observations),
    )
    assert recovered(replace(done, capture=bare), attack, psnr) >= 0.9


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.01, batch_size=2, steps=4),
        LocalRecipe(lr=0.05, batch_size=8, steps=1, momentum=0.9, weight_decay=0.05, train_mode=False),
        LocalRecipe(lr=0.01, batch_size=4, epochs=1, loss="balanced-cross-entropy"),
    ],
    ids=["four steps", "momentum and decay", "an epoch"],
)
def test_sums_of_other_recipes_come_back(rounds: Make, parts: Make, smooth: Make, psnr: Make, recipe: LocalRecipe) -> None:
    attack = Loki(bins=64, clients=3, gain=0.3)
    done = rounds(attack, parts(smooth(24, (1, 24, 24)), (8, 8, 8)), recipe=recipe, public=smooth(60, (1, 24, 24), seed=2))
    assert recovered(done, attack, psnr) >= 0.75


def test_a_block_that_never_fires_changes_nothing(smooth: Make) -> None:
    attack = Loki(bins=16, clients=2)
    for model in ("cnn", "resnet18"):
        task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model=model, mean=0.5, std=0.2)
        honest = task.build().eval()
        trap = attack.trap(task, public=None, rng=torch.Generator().manual_seed(0))
        sent = trap.arm(honest.state_dict(), round=1, node=3, nodes=(5, 3))
        assert sent is not None
        assert {key for key in sent if "loki" not in key} == set(honest.state_dict())
        armed = attack.architecture(task.build(), task).eval()
        still = {key: -value.abs() - 1 if key.endswith("bins.weight") else value for key, value in sent.items()}
        armed.load_state_dict(still)
        images = smooth(3).images
        assert torch.allclose(armed(images), honest(images), atol=1e-6)
        armed.load_state_dict(dict(sent))
        assert not torch.allclose(armed(images), honest(images), atol=1e-6)


def test_what_tells_clients_apart_is_not_trained(rounds: Make, parts: Make, smooth: Make) -> None:
    done = rounds(Loki(bins=16, clients=2), parts(smooth(8), (4, 4)), recipe=LocalRecipe(lr=0.1, batch_size=4, steps=3))
    for seen in done.replies:
        fixed = [key for key in seen.sent if key.endswith(("loki.own.weight", "loki.routes.weight"))]
        assert len(fixed) == 2
        assert all(torch.equal(seen.sent[key], seen.returned[key]) for key in fixed)


def test_rounds_choose_when_it_is_sent() -> None:
    task = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn")
    honest = task.build().state_dict()

    def armed(attack: Loki) -> list[bool]:
        trap = attack.trap(task, public=None, rng=torch.Generator().manual_seed(0))
        return [trap.arm(honest, round=round, node=1, nodes=(1,)) is not None for round in (1, 2, 3)]

    assert armed(Loki(bins=4)) == [True, False, False]
    assert armed(Loki(bins=4, rounds=(2, 3))) == [False, True, True]
    assert armed(Loki(bins=4, rounds=())) == [True, True, True]


def test_mistakes_are_told_with_the_way_out(rounds: Make, parts: Make, smooth: Make) -> None:
    sites = parts(smooth(6), (2, 2, 2))
    with pytest.raises(FlprivError, match=r"3 nodes are addressed in round 1.*set clients = 3"):
        rounds(Loki(bins=8, clients=2), sites, recipe=STEP)
    with pytest.raises(FlprivError, match="set bins = 4"):
        rounds(Loki(bins=2), sites, recipe=STEP)
    capture = rounds(Loki(bins=8, clients=3), sites, recipe=STEP).capture
    with pytest.raises(FlprivError, match="no reply to the block was captured"):
        Loki()(replace(capture, observations=()))
    with pytest.raises(FlprivError, match="attack with the options"):
        Loki(bins=8, clients=2)(capture)
    for can in (Can.TAMPER, Can.SEE_MODELS):
        with pytest.raises(ThreatError):
            Loki(bins=8, clients=3)(replace(capture, granted=capture.granted & ~can))


def test_twelve_hospitals_in_one_sum(rounds: Make, parts: Make, xrays: Any, psnr: Make) -> None:
    """Sixteen real X-rays of 64×64 pixels each: nearly all come back, each from its own hospital."""
    attack = Loki(bins=128)
    done = rounds(attack, parts(xrays.private, (16,) * 12), recipe=replace(STEP, batch_size=16), public=xrays.public)
    assert recovered(done, attack, psnr) >= 0.95
