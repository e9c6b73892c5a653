"""How well each strategy reads labels from an update: strategies against situations.

Every update is made by the site's real local loop on chest X-rays of 64 pixels (32 where it takes several steps): real ones
where FLPRIV_TEST_DATA names their folder, generated ones otherwise. The adversary holds 64 labelled images of other patients.
Printed are the share of updates whose labels come back complete (exact 95 % interval), and the share of labels right (Student's
t over updates). ``auto`` has to be exact in every update of distinct labels at untrained models; the script fails otherwise.

    python tests/benchmarks/label_recovery.py [share of the repeats, 1]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import csv
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from flpriv import data, scenario
from flpriv.attacks.inversion.labels import STRATEGIES, Strategy, read
from flpriv.attacks.inversion.unroll import replay
from flpriv.clients.training import train
from flpriv.errors import FlprivError
from flpriv.measures.intervals import clopper_pearson, student
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task

STEP = LocalRecipe(lr=0.05, steps=1, train_mode=False)
COURSE = LocalRecipe(lr=0.01, steps=4, batch_size=4, train_mode=False)
Altered = Callable[[Tensor, torch.Generator], Tensor]


@dataclass(frozen=True, kw_only=True)
class Images:
    """X-rays the adversary holds, and those of the sites, of other patients; labels are 0 and 1."""

    public: Records
    private: Records


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What an update comes from.

    Args:
        updates: how many are made.
        classes: of the task; drawn from 2 to 10 for each update where ``None``.
        images: in the round; drawn from 1 to ``classes`` where ``None``, and all different in label then.
        records: of the site; as many as ``images`` where ``None``.
        model: its name.
        recipe: of the local training; the batch size is ``images`` where one step is taken.
        local: epochs of local training on other images beforehand, at lr .01.
        alter: what is done to each tensor of the update.
        public: whether the adversary holds public images, or draws noise.
    """

    updates: int
    classes: int | None = 10
    images: int | None = 8
    records: int | None = None
    model: str = "cnn"
    recipe: LocalRecipe = STEP
    local: int = 0
    alter: Altered = lambda value, rng: value
    public: bool = True


def noisy(value: Tensor, rng: torch.Generator) -> Tensor:
    """Gaussian noise of 5 % of the tensor's root mean square."""
    return value + 0.05 * value.square().mean().sqrt() * torch.randn(value.shape, generator=rng)


def largest(value: Tensor, rng: torch.Generator) -> Tensor:
    """The largest tenth of the tensor's entries."""
    stay = value.abs().flatten().topk(ceil(value.numel() / 10)).indices
    return torch.zeros_like(value).flatten().index_copy_(0, stay, value.flatten()[stay]).view_as(value)


SITUATIONS: Mapping[str, Situation] = {
    "distinct, cnn": Situation(updates=30, classes=None, images=None),
    "distinct, lenet": Situation(updates=45, classes=None, images=None, model="lenet"),
    "distinct, resnet18": Situation(updates=9, classes=None, images=None, model="resnet18"),
    "distinct, densenet121": Situation(updates=9, classes=None, images=None, model="densenet121"),
    "distinct, resnet18, no public images": Situation(updates=6, classes=None, images=None, model="resnet18", public=False),
    "distinct, lenet, no public images": Situation(updates=30, classes=None, images=None, model="lenet", public=False),
    "8 images, 2 classes": Situation(updates=30, classes=2),
    "32 images, 2 classes": Situation(updates=20, classes=2, images=32),
    "8 images, 10 classes": Situation(updates=20),
    "32 images, 10 classes": Situation(updates=15, images=32),
    "8 images, 10 classes, lenet": Situation(updates=30, model="lenet"),
    "8 images, 10 classes, no public images": Situation(updates=15, public=False),
    "trained, 8 images, 2 classes": Situation(updates=30, classes=2, local=4),
    "trained, 32 images, 2 classes": Situation(updates=20, classes=2, images=32, local=4),
    "4 steps of 4, 4 classes, lr .001": Situation(updates=20, classes=4, images=16, recipe=replace(COURSE, lr=0.001)),
    "4 steps of 4, 4 classes, lr .01": Situation(updates=20, classes=4, images=16, recipe=COURSE),
    "4 steps of 4, 4 classes, lr .1": Situation(updates=20, classes=4, images=16, recipe=replace(COURSE, lr=0.1)),
    "momentum .9, lr .001": Situation(updates=20, classes=4, images=16, recipe=replace(COURSE, lr=0.001, momentum=0.9)),
    "train mode, resnet18, 8 images": Situation(updates=6, model="resnet18", recipe=replace(STEP, train_mode=True)),
    "balanced loss, 8 of 60 images, 2 classes": Situation(
        updates=20, classes=2, records=60, recipe=replace(STEP, loss="balanced-cross-entropy")
    ),
    "noise .05, 8 images": Situation(updates=20, alter=noisy),
    "top-k 10 %, 8 images": Situation(updates=20, alter=largest),
    "top-k 10 %, 8 images, 2 classes": Situation(updates=20, classes=2, alter=largest),
}


def images() -> Images:
    """Real X-rays where there are any, generated ones otherwise; every seventh patient is public."""
    if folder := os.environ.get("FLPRIV_TEST_DATA"):
        return _real(Path(folder) / "xray_multisite")
    tables = {"name": "labels", "sites": {"sites": 2, "patients": 250, "size": 64, "split": {"test": 0.0, "public": 0.0}}}
    which = scenario.parse(tables, root=Path.cwd())
    every = [data.records(which, site, "train") for site in range(2)]
    mixed = Records.concat([one.anonymous() for one in every])
    mixed = mixed.take(torch.randperm(len(mixed), generator=torch.Generator().manual_seed(0)))
    return Images(public=mixed.take(range(64)), private=mixed.take(range(64, len(mixed))))


def _real(folder: Path) -> Images:
    import numpy as np
    from PIL import Image

    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    pixels = [np.asarray(Image.open(folder / row["path"]).convert("L").resize((64, 64)), dtype=np.float32) / 255 for row in rows]
    labels = torch.tensor([int(row["finding"] == "COVID-19") for row in rows])
    every = Records(images=torch.from_numpy(np.stack(pixels))[:, None], labels=labels)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    patients = sorted({row["patient_id"] for row in rows})
    held = {patients[i] for i in torch.randperm(len(patients), generator=torch.Generator().manual_seed(1)).tolist()[::7]}
    sides = [[i for i in order if (rows[i]["patient_id"] in held) == public] for public in (True, False)]
    return Images(public=every.take(sides[0][:64]), private=every.take(sides[1]))


def counts(situation: Situation, xrays: Images, *, seed: int, trained: dict[int, State]) -> tuple[Tensor, dict[Strategy, Tensor]]:
    """True counts of one update, and those of every strategy that applies."""
    rng = torch.Generator().manual_seed(seed)
    classes = situation.classes or 2 + seed % 9
    number = situation.images or 1 + int(torch.randint(classes, (1,), generator=rng))
    split = len(xrays.private) // 2
    rows = split + torch.randperm(len(xrays.private) - split, generator=rng)[: situation.records or number]
    records = xrays.private.take(rows)
    if situation.images is None:
        records = replace(records, labels=torch.randperm(classes, generator=rng)[:number])
    elif classes > 2:
        records = replace(records, labels=torch.randint(classes, (len(records),), generator=rng))
    guesses = xrays.public
    recipe = situation.recipe
    if recipe.steps == 1:
        recipe = replace(recipe, batch_size=number)
    else:
        records, guesses = (replace(some, images=avg_pool2d(some.images, 2)) for some in (records, guesses))
    task = Task(
        modality="xray",
        shape=tuple(records.images.shape[1:]),
        classes=tuple(map(str, range(classes))),
        model=situation.model,
        mean=0.5,
        std=0.25,
    )
    net = task.build(seed=seed % 3 if situation.local else seed)
    if situation.local:
        if seed % 3 not in trained:
            before = replace(recipe, lr=0.01, batch_size=16, steps=None, epochs=situation.local)
            train(net, xrays.private.take(range(split)), before, classes=classes, seed=seed)
            trained[seed % 3] = {key: value.clone() for key, value in net.state_dict().items()}
        net.load_state_dict(trained[seed % 3])
    sent = {key: value.clone() for key, value in net.state_dict().items()}
    used = [row for rows in train(net, records, recipe, classes=classes, seed=seed).steps for row in rows]
    site = replay(task, sent, recipe=recipe, examples=len(records), device=torch.device("cpu"))
    returned = net.state_dict()
    update = [situation.alter(sent[name] - returned[name], rng) / recipe.lr for name in site.start]
    if not situation.public:
        guesses = Records(images=torch.rand((16, *task.shape), generator=rng), labels=torch.full((16,), -1))
    elif classes > 2:
        guesses = replace(guesses, labels=torch.arange(len(guesses)) % classes)
    reading = read(site, update, classes=classes, guesses=guesses.images, guessed=guesses.labels)
    found = {}
    for strategy, way in STRATEGIES.items():
        try:
            found[strategy] = way(reading)
        except FlprivError:
            continue
    return torch.bincount(records.labels[used], minlength=classes), found


def measure(
    name: str, xrays: Images, *, share: float, trained: dict[int, State]
) -> Iterator[tuple[Strategy, list[bool], list[float]]]:
    """For each strategy that applies in a situation: was each update's labels complete, and what share of them right?"""
    situation = SITUATIONS[name]
    updates = max(2, round(share * situation.updates))
    made = [counts(situation, xrays, seed=seed, trained=trained) for seed in range(updates)]
    for strategy in STRATEGIES:
        pairs = [(truth, found[strategy]) for truth, found in made if strategy in found]
        if len(pairs) == updates:
            right = [float(torch.minimum(truth, guess).sum() / truth.sum()) for truth, guess in pairs]
            yield strategy, [one == 1 for one in right], right


def main() -> int:
    """Print the table, and return how often ``auto`` missed where it must not."""
    share = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    torch.set_num_threads(1)
    xrays, missed, trained = images(), 0, dict[int, State]()
    for name in SITUATIONS:
        start = time.perf_counter()
        results = list(measure(name, xrays, share=share, trained=trained))
        print(f"{name}: {len(results[0][1])} updates, {time.perf_counter() - start:.1f} s")
        for strategy, complete, right in results:
            low, high = clopper_pearson(sum(complete), len(complete))
            span = student(right) or (0.0, 1.0)
            print(
                f"  {strategy:14} complete {sum(complete) / len(complete):4.0%} ({low:4.0%} – {high:4.0%})   "
                f"labels {sum(right) / len(right):6.1%} ({max(0.0, span[0]):4.0%} – {min(1.0, span[1]):4.0%})"
            )
            if strategy == "auto" and name.startswith("distinct") and "no public" not in name:
                missed += len(complete) - sum(complete)
    print(f"auto missed {missed} updates of distinct labels at untrained models")
    return missed


if __name__ == "__main__":
    sys.exit(main())
