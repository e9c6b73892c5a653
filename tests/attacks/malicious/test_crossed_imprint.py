from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from flpriv.attacks.malicious.crossed_imprint import Block, CrossedImprint
from flpriv.capture import Capture
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError, ScenarioError
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.sums import sums
from flpriv.task import Task
from flpriv.testing import blindfold
from flpriv.threat import Can, threat

Make = Callable[..., Any]

BATCH = LocalRecipe(lr=0.05, batch_size=24, steps=1)


def recovered(done: Any, attack: CrossedImprint, psnr: Make, *, least: float = 30) -> float:
    (claim,) = attack(done.capture)
    assert isinstance(claim, Reconstruction) and claim.confidence is not None
    assert len(claim.images) == len(claim.confidence) <= len(done.used)
    return float((psnr(claim.images, done.used.images) >= least).double().mean()) if len(claim.images) else 0.0


@pytest.mark.parametrize(
    ("model", "shape"),
    [
        *[
            (model, shape)
            for model in ("cnn", "flpriv.testing:dense_net")
            for shape in ((1, 20, 20), (3, 12, 16), (1, 8, 10, 12))
        ],
        ("resnet18", (1, 20, 20)),
        ("resnet18", (1, 8, 10, 12)),
        ("densenet121", (3, 32, 32)),
    ],
)
def test_a_whole_batch_comes_back(federate: Make, smooth: Make, psnr: Make, shape: tuple[int, ...], model: str) -> None:
    options = {"inputs": torch.Size(shape).numel(), "classes": 2} if ":" in model else {}
    attack = CrossedImprint(bins=120)
    done = federate(
        smooth(24, shape),
        recipe=BATCH,
        model=model,
        options=options,
        attack=attack,
        mean=0.4,
        std=0.2,
        public=smooth(50, shape, seed=9),
    )
    assert recovered(done, attack, psnr, least=60) == 1
    assert recovered(replace(done, capture=blindfold(done.capture)), attack, psnr) == 0


@pytest.mark.parametrize(
    "recipe",
    [
        LocalRecipe(lr=0.1, batch_size=6, steps=4),
        LocalRecipe(lr=0.01, batch_size=6, epochs=3),
        LocalRecipe(lr=0.05, batch_size=24, steps=2, momentum=0.9, weight_decay=0.05, train_mode=False),
        LocalRecipe(lr=0.01, batch_size=8, epochs=1, loss="balanced-cross-entropy"),
    ],
    ids=["four steps", "three epochs", "momentum and decay", "an epoch"],
)
def test_local_steps_of_sgd_hide_nothing(federate: Make, smooth: Make, psnr: Make, recipe: LocalRecipe) -> None:
    attack = CrossedImprint(bins=120, gain=100.0)
    done = federate(smooth(24), recipe=recipe, attack=attack, public=smooth(50, seed=9))
    assert recovered(done, attack, psnr, least=50) == 1


@pytest.mark.parametrize(("directions", "public"), [(1, True), (2, True), (3, True), (3, False)])
def test_directions_and_side_knowledge(federate: Make, smooth: Make, psnr: Make, directions: int, public: bool) -> None:
    attack = CrossedImprint(bins=120, directions=directions)
    done = federate(smooth(24), recipe=BATCH, attack=attack, public=smooth(50, seed=9) if public else None)
    share = recovered(done, attack, psnr)
    assert share == 1 if directions > 1 and public else share >= 0.5


def test_rounds_take_turns_where_there_are_too_many_images(federate: Make, smooth: Make, psnr: Make) -> None:
    """A third of the images is caught in each round, all of them in three, and those caught come back."""
    shared = CrossedImprint(bins=90, share=1 / 3, rounds=(1, 2, 3))
    images, public = smooth(24), smooth(60, seed=9)
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn")
    trap = shared.trap(task, public=public, rng=torch.Generator().manual_seed(0))
    model, honest, caught = shared.architecture(task.build(), task), task.build().state_dict(), []
    for round in (1, 2, 3):
        model.load_state_dict(dict(trap.arm(honest, round=round, node=1, nodes=(1,)) or {}))
        block = next(module for module in model.modules() if isinstance(module, Block))
        caught.append((block(images.images) != images.images).flatten(1).any(1))
    together = torch.stack(caught)
    assert together.any(0).all() and 24 <= int(together.sum()) <= 26 and int(together.sum(1).max()) <= 14
    once = federate(images, recipe=BATCH, attack=shared, public=public)
    assert recovered(once, shared, psnr) == pytest.approx(int(together[0].sum()) / 24)


@pytest.mark.parametrize("before", ["conv2", "fc"])
def test_deeper_in_a_network_features_come_back_and_images_behind_them(
    federate: Make, smooth: Make, psnr: Make, before: str
) -> None:
    attack = CrossedImprint(bins=60, before=before)
    done = federate(smooth(8), recipe=replace(BATCH, batch_size=8), attack=attack, public=smooth(50, seed=9), seed=3)
    assert any(f"{before}.crossed" in key for key in done.capture.observations[0].sent)
    assert recovered(done, attack, psnr) >= 0.8


def test_a_layer_that_is_not_there_is_named(smooth: Make) -> None:
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn")
    with pytest.raises(ScenarioError, match=r"conv3.*conv2"):
        CrossedImprint(before="conv3").architecture(task.build(), task)


def three_sites(federate: Make, smooth: Make, attack: CrossedImprint) -> tuple[Capture, dict[int, Records]]:
    """The sum over three sites, each with the trap made for it."""
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn")
    trap = attack.trap(task, public=smooth(50, seed=9), rng=torch.Generator().manual_seed(0))
    honest, nodes = task.build().state_dict(), (31, 11, 21)
    from flpriv.capture import Observation
    from flpriv.clients.training import train

    seen, used = [], {}
    for place, node in enumerate(nodes):
        own, model = smooth(6, seed=place), attack.architecture(task.build(), task)
        sent = trap.arm(honest, round=1, node=node, nodes=nodes)
        assert sent is not None
        model.load_state_dict(dict(sent))
        train(model, own, replace(BATCH, batch_size=6), classes=2, seed=place)
        returned = {key: value.clone() for key, value in model.state_dict().items()}
        seen.append(
            Observation(round=1, node=node, sent=sent, returned=returned, examples=6 + place, trap=attack.name, nodes=nodes)
        )
        used[node] = own
    granted = threat("malicious-sums-only").granted
    return Capture(granted=granted, task=task, observations=sums(seen), models=(honest,)), used


def test_a_sum_over_sites_gives_the_images_of_all(federate: Make, smooth: Make, psnr: Make) -> None:
    attack = CrossedImprint(bins=120)
    capture, used = three_sites(federate, smooth, attack)
    (claim,) = attack(capture)
    assert isinstance(claim, Reconstruction) and claim.node is None
    assert (psnr(claim.images, torch.cat([own.images for own in used.values()])) >= 60).all()


def test_images_in_a_sum_are_attributed_to_their_site(federate: Make, smooth: Make, psnr: Make) -> None:
    attack = CrossedImprint(bins=120, clients=4)
    capture, used = three_sites(federate, smooth, attack)
    claims = attack(capture)
    assert {claim.node for claim in claims if isinstance(claim, Reconstruction)} == set(used)
    for claim in claims:
        assert isinstance(claim, Reconstruction) and claim.node is not None
        assert len(claim.images) == 6
        assert (psnr(claim.images, used[claim.node].images) >= 60).all()


def test_more_nodes_than_can_be_told_apart_are_refused(smooth: Make) -> None:
    task = Task(modality="xray", shape=(1, 8, 8), classes=("a", "b"), model="cnn")
    trap = CrossedImprint(bins=9, clients=2).trap(task, public=None, rng=torch.Generator().manual_seed(0))
    with pytest.raises(FlprivError, match="3 nodes, clients = 2"):
        trap.arm(task.build().state_dict(), round=1, node=1, nodes=(1, 2, 3))


def test_the_block_hardly_changes_what_the_model_sees(smooth: Make) -> None:
    task = Task(modality="xray", shape=(1, 16, 16), classes=("a", "b"), model="cnn", mean=0.5, std=0.2)
    attack = CrossedImprint(bins=60, strength=0.05, clients=2)
    honest = task.build().eval()
    sent = attack.trap(task, public=smooth(30), rng=torch.Generator().manual_seed(0)).arm(
        honest.state_dict(), round=1, node=5, nodes=(5,)
    )
    assert sent is not None and {key for key in sent if "crossed" not in key} == set(honest.state_dict())
    armed = attack.architecture(task.build(), task).eval()
    armed.load_state_dict(dict(sent))
    block = next(module for module in armed.modules() if isinstance(module, Block))
    images = smooth(8, seed=4).images
    added = (block(images) - images).detach()
    assert float(added.min()) >= 0 and float(added.max()) <= 0.05 + 1e-6
    assert not bool(block.bins.weight.any()) and not bool(block.bins.bias.any())


def test_heavy_noise_leaves_nothing(federate: Make, smooth: Make, psnr: Make) -> None:
    attack = CrossedImprint(bins=120)
    done = federate(smooth(24), recipe=BATCH, attack=attack, public=smooth(50, seed=9))
    (seen,) = done.capture.observations
    rng = torch.Generator().manual_seed(0)
    size = next(value for key, value in seen.update.items() if key.endswith("crossed.bins.weight")).square().mean().sqrt()
    returned = {
        key: value + 10 * size * torch.randn(value.shape, generator=rng) if value.is_floating_point() else value
        for key, value in seen.returned.items()
    }
    noised = replace(done, capture=replace(done.capture, observations=(replace(seen, returned=returned),)))
    assert recovered(noised, attack, psnr) == 0


def test_without_a_reply_to_the_block_it_says_so(federate: Make, smooth: Make) -> None:
    honest = federate(smooth(1)).capture
    with pytest.raises(FlprivError, match="no reply to the block was captured"):
        CrossedImprint()(replace(honest, granted=honest.granted | Can.TAMPER))


def test_real_xrays_come_back(federate: Make, xrays: Any, psnr: Make) -> None:
    """Batches of 64 images of 64 by 64 pixels through 512 neurons, in one step and in four."""
    attack = CrossedImprint()
    for seed, recipe in enumerate([LocalRecipe(lr=0.05, batch_size=64, steps=1), LocalRecipe(lr=0.01, batch_size=16, steps=4)]):
        records = xrays.private.take(range(64 * seed, 64 * seed + 64))
        done = federate(records, recipe=recipe, attack=attack, public=xrays.public, seed=seed)
        assert recovered(done, attack, psnr) >= 0.95


@pytest.mark.slow
def test_real_volumes_come_back(federate: Make, test_data: Path, psnr: Make) -> None:
    """Eight CT patches of 48 voxels along each axis in one batch."""
    import nibabel
    import numpy as np

    files = [file for file in sorted((test_data / "ct_3d" / "nodules").glob("*.nii.gz")) if "mask" not in file.name]
    volumes = [np.asarray(nibabel.Nifti1Image.from_filename(file).dataobj, dtype=np.float32)[1:49, 1:49, 1:49] for file in files]
    images = (torch.from_numpy(np.stack(volumes))[:, None] + 1000).div(1400).clamp(0, 1)
    every = Records(images=images, labels=torch.arange(len(images)) % 2)
    attack = CrossedImprint(bins=120)
    done = federate(
        every.take(range(8)), recipe=replace(BATCH, batch_size=8), attack=attack, public=every.take(range(8, len(every)))
    )
    assert recovered(done, attack, psnr) == 1
