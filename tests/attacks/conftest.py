"""One round of one site, trained by the real local loop and captured by hand; smooth images and real ones."""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from flpriv.attack import Attack
from flpriv.capture import Capture, Observation
from flpriv.clients.training import train
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.task import Task
from flpriv.threat import threat

EVAL_STEP = LocalRecipe(lr=0.05, batch_size=1, steps=1, train_mode=False)
"""One plain step on one image, the model in eval mode."""


@dataclass(frozen=True, kw_only=True)
class Round:
    """What the adversary holds, and the images behind it in order of first use."""

    capture: Capture
    used: Records


Federate = Callable[..., Round]


def federate(
    records: Records,
    *,
    recipe: LocalRecipe = EVAL_STEP,
    model: str = "cnn",
    options: Mapping[str, Any] | None = None,
    classes: int = 2,
    mean: float = 0.0,
    std: float = 1.0,
    grant: tuple[str, ...] = (),
    public: Records | None = None,
    attack: Attack | None = None,
    before: Records | None = None,
    seed: int = 0,
) -> Round:
    """One round of one site. Labels are captured where ``know-labels`` is granted; ``attack`` sets its trap.

    The model sent has been trained on ``before``, in train mode.
    """
    shape = tuple(records.images.shape[1:])
    names = tuple(f"class {label}" for label in range(classes))
    task = Task(modality="xray", shape=shape, classes=names, model=model, options=options or {}, mean=mean, std=std)
    net = task.build(seed=seed)
    if before is not None:
        train(net, before, LocalRecipe(lr=0.02, batch_size=8, epochs=3), classes=classes, seed=seed)
    sent = {key: value.clone() for key, value in net.state_dict().items()}
    if attack is not None:
        trap = attack.trap(task, public=public, rng=torch.Generator().manual_seed(seed))
        armed = trap.arm(sent, round=1, node=7, nodes=(7,)) if trap else None
        assert armed is not None
        sent, net = dict(armed), attack.architecture(net, task)
    net.load_state_dict(sent)
    steps = train(net, records, recipe, classes=classes, seed=seed).steps
    rows = [row for step in steps for row in step]
    labels = records.labels[rows] if "know-order" in grant else records.labels[rows].sort().values
    seen = Observation(
        round=1,
        node=7,
        sent=sent,
        returned={key: value.detach().clone() for key, value in net.state_dict().items()},
        examples=len(records),
        local=recipe,
        labels=labels if "know-labels" in grant else None,
        trap="" if attack is None else attack.name,
        nodes=(7,),
    )
    granted = threat("honest-but-curious" if attack is None else "malicious-server", grant=grant).granted
    capture = Capture(granted=granted, task=task, observations=(seen,), public=public)
    return Round(capture=capture, used=records.take(list(dict.fromkeys(rows))))


@pytest.fixture
def shallow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Import path of a shallow network with batch normalisation, for images of 16 pixels and two classes."""
    (tmp_path / "shallow_nets.py").write_text(
        "from torch.nn import BatchNorm2d, Conv2d, Flatten, Linear, ReLU, Sequential\n\n"
        "def net(momentum=0.1):\n"
        "    return Sequential(\n"
        "        Conv2d(1, 16, 3, padding=1), BatchNorm2d(16, momentum=momentum), ReLU(),\n"
        "        Conv2d(16, 32, 3, stride=2, padding=1), BatchNorm2d(32, momentum=momentum), ReLU(),\n"
        "        Flatten(), Linear(32 * 8 * 8, 2),\n"
        "    )\n",
        encoding="utf-8",
    )
    monkeypatch.syspath_prepend(tmp_path)
    return "shallow_nets:net"


@pytest.fixture(scope="session", name="federate")
def federate_fixture() -> Federate:
    return federate


def smooth(count: int, shape: tuple[int, ...] = (1, 16, 16), *, labels: int = 2, seed: int = 0) -> Records:
    """Smooth images, each with its own brightness and contrast, filling [0, 1]; labels take turns."""
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, shape[0], *[5] * (len(shape) - 1)), generator=rng)
    fine = interpolate(coarse, size=shape[1:], mode="bilinear" if len(shape) == 3 else "trilinear")
    low = 0.4 * torch.rand((count, *[1] * len(shape)), generator=rng)
    return Records(images=(low + (1 - low) * fine * 0.95).clamp(0, 1), labels=torch.arange(count) % labels)


Smooth = Callable[..., Records]


@pytest.fixture(scope="session", name="smooth")
def smooth_fixture() -> Smooth:
    return smooth


@dataclass(frozen=True, kw_only=True)
class Xrays:
    """Real chest X-rays: images of patients the adversary may hold, and of all others, in one fixed random order."""

    public: Records
    private: Records


@pytest.fixture(scope="session")
def xrays(test_data: Path) -> Xrays:
    """X-rays of five sites at 64×64, split by patient."""
    import numpy as np
    from PIL import Image

    folder = test_data / "xray_multisite"
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    images = torch.stack(
        [
            torch.from_numpy(np.asarray(Image.open(folder / row["path"]).convert("L").resize((64, 64)), dtype=np.float32) / 255)
            for row in rows
        ]
    )[:, None]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    patients = sorted({row["patient_id"] for row in rows})
    held = {patients[i] for i in torch.randperm(len(patients), generator=torch.Generator().manual_seed(1)).tolist()[::7]}
    labels = torch.tensor([int(row["finding"] == "COVID-19") for row in rows])
    every = Records(images=images, labels=labels)
    return Xrays(
        public=every.take([i for i in order if rows[i]["patient_id"] in held]),
        private=every.take([i for i in order if rows[i]["patient_id"] not in held]),
    )


def psnr(claimed: Tensor, originals: Tensor) -> Tensor:
    """``(N,)`` PSNR in dB of each original under the best one-to-one assignment; 0 for those nothing is assigned to."""
    from scipy.optimize import linear_sum_assignment

    apart = (originals[:, None].double() - claimed[None].double()).square().flatten(2).mean(2)
    rows, columns = linear_sum_assignment(apart.numpy())
    found = torch.zeros(len(originals), dtype=torch.float64)
    found[rows] = -10 * apart[rows, columns].clamp_min(1e-12).log10()
    return found


@pytest.fixture(scope="session", name="psnr")
def psnr_fixture() -> Callable[[Tensor, Tensor], Tensor]:
    return psnr
