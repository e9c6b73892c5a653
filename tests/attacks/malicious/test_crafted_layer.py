from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flpriv.attacks.malicious.crafted_layer import CraftedLayerAttack
from flpriv.attacks.malicious.qbi import QBI
from flpriv.attacks.malicious.trap_weights import TrapWeights
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ThreatError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.task import Task
from flpriv.testing import blindfold, withhold
from flpriv.threat import Can

Make = Callable[..., Any]
NETS = Path(__file__).with_name("nets.py")
BATCH = LocalRecipe(lr=0.05, batch_size=8, steps=1)


def shares(capture: Capture, used: Tensor, attack: CraftedLayerAttack, psnr: Make) -> float:
    """Share of the images used that come back at 30 dB or better."""
    (claim,) = attack(capture)
    assert isinstance(claim, Reconstruction) and claim.confidence is not None
    assert len(claim.images) == len(claim.confidence) <= len(used)
    assert claim.confidence.tolist() == sorted(claim.confidence.tolist(), reverse=True)
    return float((psnr(claim.images, used) >= 30).double().mean()) if len(claim.images) else 0.0


@pytest.mark.parametrize(
    ("model", "shape", "connection"),
    [
        ("cnn", (1, 20, 20), "addition"),
        ("cnn", (1, 20, 20), "linear"),
        ("cnn", (1, 8, 10, 12), "addition"),
        pytest.param("resnet18", (3, 12, 16), "addition", marks=pytest.mark.slow),
        ("flpriv.testing:dense_net", (1, 20, 20), "linear"),
        ("vit", (1, 16, 24), "addition"),
    ],
)
def test_an_inserted_layer_hands_a_batch_back(
    federate: Make, smooth: Make, psnr: Make, shape: tuple[int, ...], model: str, connection: Any
) -> None:
    options = {"inputs": torch.Size(shape).numel(), "classes": 2} if ":" in model else {}
    attack = QBI(neurons=96, connection=connection, batch=6)
    done = federate(
        smooth(6, shape, seed=2),
        recipe=BATCH,
        model=model,
        options=options,
        attack=attack,
        mean=0.4,
        std=0.2,
        public=smooth(60, shape, seed=50),
    )
    assert shares(done.capture, done.used.images, attack, psnr) >= 5 / 6
    assert shares(blindfold(done.capture), done.used.images, attack, psnr) == 0


@pytest.mark.parametrize("normalised", [(0.0, 1.0), (0.4, 0.2)], ids=["raw", "normalised"])
@pytest.mark.parametrize(
    ("model", "options"),
    [("flpriv.testing:dense_net", {"inputs": 256, "classes": 2}), (f"{NETS}:strided", {})],
    ids=["dense", "convolutions"],
)
@pytest.mark.parametrize("attack", [QBI(placement="parameters", batch=8), TrapWeights(placement="parameters", batch=4)])
def test_the_models_own_layers_hand_a_batch_back(
    federate: Make,
    smooth: Make,
    psnr: Make,
    attack: CraftedLayerAttack,
    model: str,
    options: Mapping[str, Any],
    normalised: tuple[float, float],
) -> None:
    mean, std = normalised
    known = smooth(60, seed=50)
    done = federate(
        smooth(6, seed=2), recipe=BATCH, model=model, options=options, attack=attack, mean=mean, std=std, public=known
    )
    honest = done.capture.task.build().state_dict()
    (seen,) = done.capture.observations
    assert {k: v.shape for k, v in seen.sent.items()} == {k: v.shape for k, v in honest.items()}
    assert shares(done.capture, done.used.images, attack, psnr) >= 5 / 6
    assert shares(blindfold(done.capture), done.used.images, attack, psnr) == 0


def test_through_pooling_a_coarser_image_comes_back(federate: Make, smooth: Make) -> None:
    """What comes back of 32 x 32 pixels through two poolings is nearer to the image than to any other."""
    attack = QBI(placement="parameters", batch=8)
    shape = (1, 32, 32)
    done = federate(
        smooth(4, shape, seed=3), recipe=BATCH, model=f"{NETS}:Pooled", attack=attack, public=smooth(60, shape, seed=50)
    )
    (claim,) = attack(done.capture)
    assert isinstance(claim, Reconstruction)
    apart = (done.used.images[:, None] - claim.images[None]).square().flatten(2).mean(2).sqrt()
    assert sorted(apart.argmin(1).tolist()) == list(range(4))
    assert apart.amin(1).max() < 0.12, apart.amin(1)


@pytest.mark.parametrize("placement", ["inserted", "parameters"])
def test_a_sum_over_nodes_is_read_like_a_reply(federate: Make, smooth: Make, psnr: Make, placement: Any) -> None:
    """Two nodes of three images; the sum is weighted by their examples."""
    attack = QBI(neurons=128, batch=6, placement=placement)
    model = {"model": "flpriv.testing:dense_net", "options": {"inputs": 256, "classes": 2}}
    both = smooth(6, seed=2)
    nodes = [
        federate(both.take(rows), recipe=BATCH, attack=attack, public=smooth(60, seed=50), **model)
        for rows in (range(3), range(3, 6))
    ]
    seen = [replace(done.capture.observations[0], node=node, nodes=(5, 6)) for node, done in zip((5, 6), nodes, strict=True)]
    capture = withhold(replace(nodes[0].capture, observations=tuple(seen)), Can.TAMPER | Can.SEE_MODELS)
    assert [o.node for o in capture.observations] == [None]
    (claim,) = attack(capture)
    assert isinstance(claim, Reconstruction) and claim.node is None
    assert float((psnr(claim.images, both.images) >= 30).double().mean()) >= 5 / 6


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.01, batch_size=2, steps=4),
        LocalRecipe(lr=0.01, batch_size=8, steps=1, momentum=0.9, weight_decay=0.05, train_mode=False),
        LocalRecipe(lr=0.01, batch_size=4, epochs=1, loss="balanced-cross-entropy"),
    ],
    ids=["four steps", "momentum and decay", "an epoch"],
)
def test_updates_of_other_recipes_come_back(federate: Make, smooth: Make, psnr: Make, recipe: LocalRecipe) -> None:
    attack = QBI(neurons=256, batch=8, gain=0.1 if recipe.steps != 1 else 1e-3, connection="linear")
    done = federate(smooth(8, seed=2), recipe=recipe, attack=attack, public=smooth(60, seed=50))
    assert shares(done.capture, done.used.images, attack, psnr) >= 0.75


def test_the_honest_layers_keep_their_names_and_what_they_compute(smooth: Make) -> None:
    attack = QBI(neurons=16)
    for model in ("cnn", "vit"):
        task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model=model, mean=0.5, std=0.2)
        honest = task.build().eval()
        trap = attack.trap(task, public=None, rng=torch.Generator().manual_seed(0))
        sent = trap.arm(honest.state_dict(), round=1, node=3, nodes=(3,))
        assert sent is not None
        assert {key for key in sent if "crafted" not in key} == set(honest.state_dict())
        armed = attack.architecture(task.build(), task).eval()
        silent = {key: torch.full_like(value, -1e3) for key, value in sent.items() if key.endswith("neurons.bias")}
        armed.load_state_dict({**sent, **silent})
        images = smooth(3).images
        assert torch.allclose(armed(images), honest(images), atol=1e-6), "a layer that never fires must change nothing"
        copied = copy.deepcopy(armed)
        copied.load_state_dict(dict(sent))
        torch.autograd.backward(copied(images).sum())
        assert any(p.grad is not None and bool(p.grad.any()) for name, p in copied.named_parameters() if "crafted" in name)


def test_disarmed_replies_are_the_honest_model_and_what_its_layers_learned(federate: Make, smooth: Make) -> None:
    for attack, learns in ((QBI(neurons=16), True), (QBI(placement="parameters"), False)):
        done = federate(
            smooth(8), recipe=BATCH, attack=attack, model="flpriv.testing:dense_net", options={"inputs": 256, "classes": 2}
        )
        (seen,) = done.capture.observations
        honest = done.capture.task.build().state_dict()
        trap = attack.trap(done.capture.task, public=None, rng=torch.Generator().manual_seed(0))
        back = trap.disarm(seen.returned, sent=seen.sent, honest=honest)
        assert back.keys() == honest.keys()
        assert any(not torch.equal(back[key], honest[key]) for key in honest) == learns


def test_rounds_choose_when_it_is_sent() -> None:
    task = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn")
    honest = task.build().state_dict()

    def armed(attack: CraftedLayerAttack) -> list[bool]:
        trap = attack.trap(task, public=None, rng=torch.Generator().manual_seed(0))
        return [trap.arm(honest, round=round, node=1, nodes=(1,)) is not None for round in (1, 2, 3)]

    assert armed(QBI(neurons=4)) == [True, False, False]
    assert armed(TrapWeights(neurons=4, rounds=(2, 3))) == [False, True, True]
    assert armed(QBI(neurons=4, rounds=())) == [True, True, True]


def test_where_no_own_layer_sees_the_image_the_model_is_named() -> None:
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn")
    with pytest.raises(FlprivError, match="qbi: model 'cnn' has no hidden dense layer"):
        QBI(placement="parameters").trap(task, public=None, rng=torch.Generator().manual_seed(0))


def test_without_a_reply_it_says_so(federate: Make, smooth: Make) -> None:
    honest = federate(smooth(1)).capture
    with pytest.raises(FlprivError, match="no reply to the crafted layer was captured"):
        QBI()(replace(honest, granted=honest.granted | Can.TAMPER))


@pytest.mark.parametrize("can", [Can.TAMPER, Can.SEE_MODELS])
def test_it_needs_to_tamper_and_to_see_sums(federate: Make, smooth: Make, can: Can) -> None:
    attack = QBI(neurons=8)
    capture = federate(smooth(8), recipe=BATCH, attack=attack).capture
    with pytest.raises(ThreatError):
        attack(replace(capture, granted=capture.granted & ~can))


def test_equal_seeds_equal_claims_and_the_capture_stays(federate: Make, smooth: Make) -> None:
    attack = TrapWeights(neurons=64)
    one, again = (federate(smooth(8), recipe=BATCH, attack=attack, seed=3).capture for _ in range(2))
    (first,), (second,) = attack(one, seed=1), attack(again, seed=1)
    assert isinstance(first, Reconstruction) and isinstance(second, Reconstruction)
    assert first.confidence is not None and second.confidence is not None
    assert torch.equal(first.images, second.images) and torch.equal(first.confidence, second.confidence)
    assert all(torch.equal(value, again.observations[0].sent[key]) for key, value in one.observations[0].sent.items())
    assert all(torch.equal(value, again.observations[0].returned[key]) for key, value in one.observations[0].returned.items())


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["inserted", "parameters"])
@pytest.mark.parametrize("attack", [QBI(batch=8), TrapWeights(batch=8)])
def test_real_xrays_come_back(federate: Make, xrays: Any, psnr: Make, attack: CraftedLayerAttack, placement: Any) -> None:
    """Three batches of eight at 64 x 64 pixels, 512 neurons: at least 85 % at 30 dB or better."""
    attack = replace(attack, placement=placement)
    model = {"model": "flpriv.testing:dense_net", "options": {"inputs": 4096, "width": 512, "classes": 2}}
    found = []
    for batch in range(3):
        records: Records = xrays.private.take(range(8 * batch, 8 * batch + 8))
        chosen = model if placement == "parameters" else {}
        done = federate(records, recipe=BATCH, attack=attack, public=xrays.public, seed=batch, **chosen)
        found.append(shares(done.capture, done.used.images, attack, psnr))
    assert sum(found) / 3 >= 0.85


@pytest.mark.parametrize("placement", ["inserted", "parameters"])
def test_carry_lifts_the_update_over_noise(federate: Make, smooth: Make, psnr: Make, placement: Any) -> None:
    """Noise that hides all images at a carry of 1 hides few of them at 1000."""
    shown = {}
    for carry in (1.0, 1000.0):
        attack = QBI(neurons=128, batch=6, placement=placement, carry=carry)
        done = federate(
            smooth(6, seed=2),
            recipe=BATCH,
            attack=attack,
            public=smooth(60, seed=50),
            model="flpriv.testing:dense_net",
            options={"inputs": 256, "classes": 2},
        )
        (seen,) = done.capture.observations
        rng = torch.Generator().manual_seed(0)
        noisy = {key: value + 1e-5 * torch.randn(value.shape, generator=rng) for key, value in seen.returned.items()}
        capture = replace(done.capture, observations=(replace(seen, returned=noisy),))
        shown[carry] = shares(capture, done.used.images, attack, psnr)
    assert shown[1.0] <= 1 / 6 < 4 / 6 <= shown[1000.0]
