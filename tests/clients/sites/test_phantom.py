"""Generated hospitals: the same from run to run, with the physics and the differences they promise."""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score

from flpriv.clients.sites.acquisition import WATER, Equipment, Pose, attenuation, frame, projection, radiograph, tomogram
from flpriv.clients.sites.anatomy import Grid, Patient, hounsfield, spaced
from flpriv.clients.sites.phantom import PhantomSites
from flpriv.registry import create
from flpriv.site import SplitPlan, load, split_patients

SEXES: tuple[Literal["F", "M"], ...] = ("F", "M")
PLAIN = Equipment(marker="", border=0.0, sharpen=0.0, blur=0.0)


def volume(patient: Patient, size: int = 48, breath: float = 1.0) -> np.ndarray:
    return hounsfield(patient, Grid(x=spaced(350, size), y=spaced(280, size), z=spaced(350, size)), breath=breath)


def person(seed: int = 1, *, sex: Literal["F", "M"] = "M", age: float = 40, lesions: int = 0) -> Patient:
    return Patient(sex=sex, age=age, lesions=lesions, seed=seed)


@pytest.mark.parametrize(("dimensions", "shape"), [(2, (1, 32, 32)), (3, (1, 32, 32, 32))])
def test_images_are_the_same_from_run_to_run_and_in_any_order(dimensions: int, shape: tuple[int, ...]) -> None:
    options = {"sites": 2, "patients": 4, "size": 32, "dimensions": dimensions, "seed": 7}
    first, again = (create("sites", "phantom", options) for _ in range(2))
    assert first.shape == shape and first.modality == ("xray" if dimensions == 2 else "ct")
    for one, other in zip(first.list(), again.list(), strict=True):
        assert one.entries == other.entries
        images = [np.asarray(one.read(entry)) for entry in one.entries]
        for entry, image in reversed(list(zip(other.entries, images, strict=True))):
            assert np.array_equal(np.asarray(other.read(entry)), image)
            assert image.shape == shape and image.dtype == np.float32 and image.min() >= 0 and image.max() <= 1
    other_seed = create("sites", "phantom", {**options, "seed": 8}).list()[0]
    assert not np.array_equal(other_seed.read(other_seed.entries[0]), images[0])


def test_more_sites_and_patients_leave_the_others_anatomy_as_it_was() -> None:
    small, large = PhantomSites(sites=2, patients=3), PhantomSites(sites=5, patients=9)
    assert small.patient(1, 2).seed == large.patient(1, 2).seed


def test_patients_are_whole_and_known() -> None:
    sites = PhantomSites(patients=60).list()
    entries = [entry for site in sites for entry in site.entries]
    assert len({entry.id for entry in entries}) == len(entries) > 240
    for site in sites:
        labels: dict[str, set[int]] = {}
        for entry in site.entries:
            labels.setdefault(entry.patient, set()).add(entry.label)
            assert entry.patient.startswith(site.name)
        assert len(labels) == 60 and all(len(found) == 1 for found in labels.values())
        assert 0.2 < np.mean([entry.label for entry in site.entries]) < 0.8
    assert {entry.attributes["sex"] for entry in entries} == {"F", "M"}
    ages = [int(entry.attributes["age"]) for entry in entries]
    assert min(ages) >= 18 and max(ages) <= 92 and np.std(ages) > 12
    train = [{e.patient for e in site.select("train")} for site in split_patients(sites, SplitPlan())]
    held = [{e.patient for e in site.select("test")} for site in split_patients(sites, SplitPlan())]
    assert all(not a & b for a, b in zip(train, held, strict=True))


def test_beer_lambert_on_a_slab_of_water() -> None:
    slab = np.full((2, 100, 2), -1000, dtype=np.float32)
    slab[:, 20:70] = 0
    assert np.allclose(projection(slab, 2.0), WATER * 100, rtol=1e-4)
    bone = np.full((1, 1, 1), 600, dtype=np.float32)
    assert attenuation(bone, bone=1.0).item() == pytest.approx(WATER * (1.6 + 0.5))
    assert attenuation(bone, bone=0.0).item() == pytest.approx(WATER * 1.6)


def test_the_radiograph_is_the_projection_of_the_volume() -> None:
    patient, size = person(sex="F"), 48
    grid = frame(PLAIN, Pose(), size=size, dimensions=2)
    lines = projection(hounsfield(patient, grid), float(grid.y[1] - grid.y[0]), bone=PLAIN.bone)
    image = radiograph(patient, PLAIN, size=size)
    inside = (image > 0.02) & (image < 0.98)
    ranks = [np.argsort(np.argsort(values[inside])) for values in (lines, image)]
    assert np.corrcoef(ranks[0], ranks[1])[0, 1] > 0.999


def test_the_ct_projects_to_the_radiograph() -> None:
    patient, size = person(3), 64
    cube = Grid(x=spaced(350, size), y=spaced(350, size), z=spaced(350, size))
    deep = Grid(x=cube.x, y=spaced(280, 40), z=cube.z)
    cubic, plane = (projection(hounsfield(patient, grid), float(grid.y[1] - grid.y[0])) for grid in (cube, deep))
    assert np.abs(cubic - plane).mean() < 0.04 * plane.mean()


def test_organs_keep_their_size_whatever_the_grid() -> None:
    patient = person(5)
    litres = []
    for size in (32, 64):
        voxel = (350 / size) ** 2 * (280 / size)
        chest = volume(patient, size)
        litres.append(((chest > -950) & (chest < -650)).sum() * voxel / 1e6)
    assert 2.5 < litres[1] < 9 and litres[0] == pytest.approx(litres[1], rel=0.15)


def test_breath_moves_the_diaphragm() -> None:
    def air(breath: float) -> float:
        chest = volume(person(2), breath=breath)
        return float(((chest > -950) & (chest < -600)).mean())

    assert air(0.5) < 0.93 * air(1.0)


def test_age_thins_bone_and_sex_shapes_the_chest() -> None:
    seeds = range(6)
    dense = {age: np.mean([(volume(person(s, age=age), 32) > 350).sum() for s in seeds]) for age in (25, 85)}
    assert dense[85] < 0.8 * dense[25]
    lungs = {sex: np.mean([(volume(person(s, sex=sex), 32) < -600)[:, 10:22, 8:24].sum() for s in seeds]) for sex in SEXES}
    assert lungs["F"] < 0.95 * lungs["M"]
    front = {sex: np.mean([(volume(person(s, sex=sex), 32)[8:16, :8] > -300).sum() for s in seeds]) for sex in SEXES}
    assert front["F"] > front["M"]


def test_masses_add_tissue_to_the_lungs_and_to_nothing_else() -> None:
    for seed in range(4):
        healthy, ill = volume(person(seed)), volume(person(seed, lesions=2))
        changed = np.abs(ill - healthy) > 50
        assert changed.sum() > 20
        assert (ill[changed] > healthy[changed]).mean() > 0.95
        assert healthy[changed].mean() < -500
    clean = radiograph(person(1), PLAIN, size=48)
    assert np.abs(radiograph(person(1, lesions=2), PLAIN, size=48) - clean).max() > 0.1


def test_equipment_shows_in_the_image() -> None:
    patient = person(4)
    plain = radiograph(patient, PLAIN, size=64)
    marked = radiograph(patient, Equipment(marker="L", border=0.05), size=64)
    assert (marked[:3] == 0).all() and (marked[:, -3:] == 0).all()
    assert (marked[3:16, 48:61] == 1).sum() > 8 and (plain[3:16, 48:61] == 1).sum() == 0
    noise = [radiograph(patient, Equipment(photons=n), size=64, rng=np.random.default_rng(0)) for n in (2e3, 2e5)]
    quiet = radiograph(patient, Equipment(), size=64)
    assert np.std(noise[0] - quiet) > 3 * np.std(noise[1] - quiet) > 0
    sharp, soft = (radiograph(patient, Equipment(sharpen=s), size=64) for s in (1.0, 0.0))
    assert np.abs(np.diff(sharp)).mean() > np.abs(np.diff(soft)).mean()
    near, far = (radiograph(patient, Equipment(field=f), size=64) for f in (300, 420))
    assert (near[:, 0] > 0.1).sum() > (far[:, 0] > 0.1).sum()
    flat, table = (tomogram(patient, Equipment(table=t), size=32) for t in (400, 5))
    assert (table - flat)[:, 16:].sum() > 10


def features(source: PhantomSites) -> tuple[np.ndarray, np.ndarray]:
    rows, places = [], []
    for place, site in enumerate(source.list()):
        for entry in site.entries:
            image = np.asarray(site.read(entry))[0]
            middle = image[8:24, 8:24]
            rows.append(
                [image.mean(), image.std(), middle.mean(), middle.std(), np.abs(np.diff(image)).mean(), (image == 0).mean()]
            )
            places.append(place)
    table = np.array(rows)
    return (table - table.mean(axis=0)) / table.std(axis=0), np.array(places)


def test_sites_can_be_told_apart_only_where_they_differ() -> None:
    def accuracy(effect: float) -> float:
        x, y = features(PhantomSites(patients=24, size=32, site_effect=effect))
        odd = np.arange(len(y)) % 2 == 1
        return float(LogisticRegression(C=10, max_iter=500).fit(x[odd], y[odd]).score(x[~odd], y[~odd]))

    assert accuracy(1.0) > 0.75
    assert accuracy(0.0) < 0.5
    assert len({PhantomSites(site_effect=0.0).equipment(place) for place in range(4)}) == 1


@pytest.mark.slow
def test_masses_can_be_learned() -> None:
    import torch
    from torch import nn

    from flpriv.records import Records

    sites = split_patients(PhantomSites(patients=100).list(), SplitPlan())
    train, test = (Records.concat([load(s, split, shape=(1, 64, 64)) for s in sites]) for split in ("train", "test"))
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(65536, 2)
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.03)
    for _ in range(24):
        for batch in torch.utils.data.BatchSampler(torch.randperm(len(train)).tolist(), 16, drop_last=False):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model((train.images[batch] - 0.5) / 0.25), train.labels[batch])
            torch.autograd.backward([loss])
            optimizer.step()
    with torch.no_grad():
        scores = model((test.images - 0.5) / 0.25).softmax(dim=1)[:, 1]
    assert roc_auc_score(test.labels, scores) > 0.72
