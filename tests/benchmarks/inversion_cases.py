"""Known updates of real images, for the benchmarks of gradient inversion: what a site sends, and what it trained on."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from flpriv import data, scenario
from flpriv.attack import Attack
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.finding import Finding
from flpriv.measures import measure
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import NAMED, Can
from flpriv.truth import Truth

STEP = LocalRecipe(lr=0.1, steps=1, train_mode=False)


@dataclass(frozen=True, kw_only=True)
class Case:
    """Updates of an untrained model, one a node, labels and order known.

    Args:
        capture: of the adversary.
        truth: what is behind it.
    """

    capture: Capture
    truth: Truth

    def attack(self, attack: Attack, *, seed: int = 0) -> Finding:
        """What comes of an attack on all updates."""
        claims = attack(self.capture, seed=seed)
        found = measure(
            claims, self.truth, attack=attack.name, name=attack.name, goal=attack.goal, setting="none", defense="none"
        )
        return found[0]


def xrays(size: int) -> tuple[Records, Records]:
    """Chest X-rays of five sites: those the sites train on, and public ones of other patients."""
    root = os.environ.get("FLPRIV_TEST_DATA")
    if not root:
        raise SystemExit("set FLPRIV_TEST_DATA to the folder of real images")
    columns = {"label": "finding", "site": "site", "age": "age", "sex": "sex"}
    tables = {
        "name": "benchmark",
        "sites": {
            "source": "manifest",
            "root": f"{root}/xray_multisite",
            "modality": "xray",
            "size": size,
            "columns": columns,
            "classes": ["no finding", "finding"],
            "label_map": {"No Finding": "no finding"},
            "label_other": "finding",
            "label_empty": "drop",
            "split": {"test": 0.0, "public": 0.3, "seed": 1},
        },
    }
    which = scenario.parse(tables, root=Path.cwd())
    places = range(len(data.sites(which)))
    train_part, public = (Records.concat([data.records(which, p, split) for p in places]) for split in ("train", "public"))
    return _shuffled(train_part), _shuffled(public)


def nodules(size: int) -> tuple[Records, Records]:
    """Lung nodules in CT as volumes of ``size`` voxels along each axis: of one part of the series, and public ones of another."""
    root = os.environ.get("FLPRIV_TEST_DATA")
    if not root:
        raise SystemExit("set FLPRIV_TEST_DATA to the folder of real images")
    found = []
    with np.load(Path(root) / "medmnist" / "lidc_nodule3d.npz") as file:
        for part in ("train", "val"):
            stack = torch.from_numpy(file[f"{part}_images"]).float()[:, None] / 255
            if size != stack.shape[-1]:
                stack = torch.nn.functional.interpolate(stack, size=(size,) * 3, mode="trilinear", align_corners=False)
            ids = tuple(f"{part}-{i}" for i in range(len(stack)))
            found.append(Records(images=stack, labels=torch.zeros(len(stack), dtype=torch.long), ids=ids, patients=ids))
    return _shuffled(found[0]), _shuffled(found[1])


def case(
    source: tuple[Records, Records],
    *,
    model: str,
    batch: int,
    updates: int,
    recipe: LocalRecipe = STEP,
    classes: int = 10,
    labels: Sequence[int] = (),
    first: int = 0,
    ordered: bool = True,
    **options: object,
) -> Case:
    """``updates`` updates of ``batch`` images each.

    Args:
        source: private and public records.
        model: its name; ``options`` are its own.
        batch: images of an update.
        updates: how many, each of other images.
        recipe: of the local training; a single step takes all images at once.
        classes: of the task.
        labels: of the images of each update; none: 0, 1, … as far as there are classes.
        first: skip so many private images.
        ordered: whether the order of the local steps is known.
        options: of the model.
    """
    private, public = source
    names = tuple(map(str, range(classes)))
    shape = tuple(private.images.shape[1:])
    task = Task(modality="xray", shape=shape, classes=names, model=model, options=options, mean=0.5, std=0.25)
    recipe = replace(recipe, batch_size=batch if recipe.steps == 1 else recipe.batch_size)
    granted = NAMED["honest-but-curious"] | Can.KNOW_LABELS | (Can.KNOW_ORDER if ordered else Can(0))
    sent = {k: v.clone() for k, v in task.build().state_dict().items()}
    seen, used = [], {}
    for node in range(updates):
        begin = first + node * batch
        given = torch.tensor(labels) if labels else torch.arange(batch) % classes
        own = replace(private.take(range(begin, begin + batch)), labels=given)
        site = task.build()
        done = train(site, own, recipe, classes=classes, seed=node)
        order = [row for step in done.steps for row in step]
        told = own.labels[order] if ordered else own.labels[order].sort().values
        returned = {k: v.clone() for k, v in site.state_dict().items()}
        seen.append(
            Observation(round=1, node=node, sent=sent, returned=returned, examples=batch, local=recipe, labels=told, defenses=())
        )
        used[1, node] = own
    capture = Capture(granted=granted, task=task, observations=tuple(seen), models=(sent,), public=public)
    return Case(capture=capture, truth=Truth(used=used, everyone=private, public=public))


def row(finding: Finding, names: Sequence[str]) -> str:
    """Metrics of a finding whose names begin so, in one line: value, 95 % interval, the better null."""
    parts = []
    for metric in (metric for name in names for metric in finding.metrics if metric.name.startswith(name)):
        spread = f" [{metric.low:.3g}, {metric.high:.3g}]" if metric.low is not None and metric.high is not None else ""
        null = f" (null {metric.best_null:.3g})" if metric.best_null is not None else ""
        parts.append(f"{metric.name} {metric.value:.4g}{spread}{null}")
    return "; ".join(parts)


def _shuffled(records: Records) -> Records:
    return records.take(torch.randperm(len(records), generator=torch.Generator().manual_seed(0)))
