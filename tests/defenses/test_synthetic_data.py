"""Synthetic data: what the generator paints, and what a site trains on."""

from __future__ import annotations

import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flpriv import data
from flpriv.clients.training import train as train_locally
from flpriv.defense import Loop
from flpriv.defenses.dp_sgd import DPSGD
from flpriv.defenses.synthetic_data import SyntheticData, fit
from flpriv.errors import RunError, ScenarioError
from flpriv.measures.utility import utility
from flpriv.recipe import LocalRecipe
from flpriv.scenario import parse

from .conftest import Loops, Surroundings, train


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 2))


def dataset(loop: Loop) -> tuple[Tensor, Tensor, Tensor]:
    """What the loader goes through in an epoch, in the order of rows."""
    images, labels, rows = (torch.cat(parts) for parts in zip(*loop.loader, strict=True))
    order = torch.argsort(rows, stable=True)
    return images[order], labels[order], rows[order]


@pytest.mark.parametrize("overlay", [2, 8])
def test_images_of_a_class_have_its_mean_and_covariance(overlay: int) -> None:
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(4000) % 2
    spread = torch.stack([torch.tensor([0.10, 0.02, 0.05, 0.01]), torch.tensor([0.03, 0.08, 0.01, 0.06])])
    images = (0.4 + 0.2 * labels[:, None] + torch.randn(4000, 4, generator=rng) * spread[labels]).reshape(-1, 1, 2, 2)
    images[:, 0, 0, 1] += images[:, 0, 0, 0] - 0.4
    made = fit(images, labels, overlay=overlay, shrinkage=0).sample(labels, rng=torch.Generator().manual_seed(1))
    for label in (0, 1):
        one, other = images[labels == label].flatten(1), made[labels == label].flatten(1)
        assert torch.allclose(one.mean(0), other.mean(0), atol=0.01)
        assert torch.allclose(torch.cov(one.T), torch.cov(other.T), atol=1.5e-3)


def test_shrinkage_pulls_a_class_towards_the_others() -> None:
    images, labels = torch.rand(40, 1, 4, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([0] * 39 + [1])
    generator = fit(images, labels, overlay=8, shrinkage=3)
    expected = (images[39] + 3 * images.mean(0)) / 4
    assert torch.allclose(generator.means[1], expected.flatten(), atol=1e-6)
    made = generator.sample(torch.ones(200, dtype=torch.long), rng=torch.Generator().manual_seed(1))
    assert made.flatten(1).std(0).min() > 0.05


def test_an_image_is_made_of_as_many_records_as_asked_for() -> None:
    images = torch.eye(20).reshape(20, 1, 4, 5) / 10 + 0.4
    for overlay in (2, 5):
        generator = fit(images, torch.zeros(20, dtype=torch.long), overlay=overlay, shrinkage=5)
        made = generator.sample(torch.zeros(30, dtype=torch.long), rng=torch.Generator().manual_seed(1)).flatten(1)
        assert ((made > made.median(1, keepdim=True).values + 1e-3).sum(1) == overlay).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 5, 7), (1, 6, 5, 4)])
def test_one_synthetic_record_stands_for_each_real_one(shape: tuple[int, ...], loop: Loops, local: Surroundings) -> None:
    real = loop(model(), shape=shape)
    done = SyntheticData().prepare(real, local=local())
    images, labels, rows = dataset(real)
    painted, named, stand_for = dataset(done)
    assert torch.equal(rows, stand_for) and torch.equal(labels, named)
    assert painted.shape == images.shape and painted.dtype == torch.float32
    assert painted.min() >= 0
    assert painted.max() <= 1
    assert torch.cdist(painted.flatten(1), images.flatten(1)).min() > 0.1
    assert done.loader.batch_size == real.loader.batch_size


def test_the_same_images_in_every_round_in_another_order(loop: Loops, local: Surroundings) -> None:
    first = SyntheticData().prepare(loop(model()), local=local(round=1, seed=1))
    second = SyntheticData().prepare(loop(model()), local=local(round=2, seed=2))
    assert torch.equal(dataset(first)[0], dataset(second)[0])
    assert not torch.equal(next(iter(first.loader))[2], next(iter(second.loader))[2])


def test_other_options_or_records_make_other_images(loop: Loops, local: Surroundings) -> None:
    one = dataset(SyntheticData().prepare(loop(model()), local=local()))[0]
    two = dataset(SyntheticData(shrinkage=50).prepare(loop(model()), local=local()))[0]
    few = dataset(SyntheticData().prepare(loop(model(), records=12), local=local()))[0]
    assert not torch.equal(one, two)
    assert len(few) == 12


def test_without_a_folder_it_depends_on_the_seed_alone(loop: Loops, local: Surroundings) -> None:
    made = [dataset(SyntheticData().prepare(loop(model()), local=local(seed=seed, folder=None)))[0] for seed in (1, 1, 2)]
    assert torch.equal(made[0], made[1])
    assert not torch.equal(made[0], made[2])


def test_the_file_is_private_and_a_damaged_one_is_told(loop: Loops, local: Surroundings, tmp_path: Path) -> None:
    SyntheticData().prepare(loop(model()), local=local())
    (file,) = tmp_path.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_bytes(b"cut short")
    with pytest.raises(RunError, match=r"synthetic-data-\w+\.safetensors: not a file of synthetic images .* remove it"):
        SyntheticData().prepare(loop(model()), local=local())


def test_mixed_with_the_real_ones(loop: Loops, local: Surroundings) -> None:
    real = loop(model())
    images, labels, rows = dataset(SyntheticData(mix=True).prepare(real, local=local()))
    assert rows.tolist() == [row for row in range(24) for _ in range(2)]
    assert labels.tolist() == [row % 2 for row in rows.tolist()]
    held = {image.numpy().tobytes() for image in images}
    assert all(image.numpy().tobytes() in held for image in dataset(real)[0])
    assert len(held) == 48


def test_before_dp_sgd_and_not_after(loop: Loops, local: Surroundings) -> None:
    private, synthetic = DPSGD(), SyntheticData()
    stacked = private.prepare(synthetic.prepare(loop(private.architecture(model())), local=local()), local=local())
    assert list(train(stacked))
    turned = private.prepare(loop(private.architecture(model())), local=local())
    with pytest.raises(ScenarioError, match="name this defence before those that do so"):
        synthetic.prepare(turned, local=local())


def test_too_few_records_are_refused(loop: Loops, local: Surroundings) -> None:
    with pytest.raises(ScenarioError, match="7 training records, and a generator of fewer than 8 would paint them"):
        SyntheticData().prepare(loop(model(), records=7), local=local())


def test_a_site_notes_how_many(loop: Loops, local: Surroundings) -> None:
    here = local()
    SyntheticData().prepare(loop(model()), local=here)
    assert here.notes == {"synthetic records": 24.0}


@pytest.mark.slow
def test_a_model_learns_from_them_what_it_would_from_real_x_rays(test_data: Path, local: Surroundings) -> None:
    sites = {"source": "folder", "root": str(test_data / "xray_folder"), "modality": "xray", "size": 32, "split": {"public": 0.0}}
    scenario = parse({"sites": sites}, root=test_data)
    members, others, task = data.records(scenario, 0, "train"), data.records(scenario, 0, "test"), data.task(scenario)

    def auroc(prepare: Callable[[Loop], Loop] | None) -> float:
        net = task.build(seed=0)
        train_locally(net, members, LocalRecipe(lr=0.02, momentum=0.9, epochs=12), classes=2, seed=0, prepare=prepare)
        with torch.inference_mode():
            metrics = utility(net.eval()(others.images), others.labels, others.patients)
        return next(metric.value or 0.0 for metric in metrics if metric.name == "AUROC")

    def exchanged(loop: Loop) -> Loop:
        images, labels, rows = dataset(SyntheticData().prepare(loop, local=local()))
        return replace(loop, loader=DataLoader(TensorDataset(images, 1 - labels, rows), batch_size=16, shuffle=True))

    real, synthetic = auroc(None), auroc(lambda loop: SyntheticData().prepare(loop, local=local()))
    assert real > 0.8
    assert synthetic > 0.5 + 0.6 * (real - 0.5)
    assert auroc(exchanged) < 0.4
