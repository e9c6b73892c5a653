"""Gradient inversion of obfuscated updates: plain inverting gradients, L-BFGS, ROG and the latent prior.

Real chest X-rays of 64 pixels from the folder named by FLPRIV_TEST_DATA, the small CNN with ten classes at its initial weights,
labels known, batches of one image. ROG and the latent prior are shown without and with their restoration network. Plain
inverting gradients is told nothing of the sites' defences, has as many iterations as the latent prior, and runs with the total
variation of the best-known library (.2) and with ours (.01). PSNR is a mean over images; re-identified is an image whose
reconstruction correlates with an image of the same patient more than with the images of all other patients. Run it by itself:
``python tests/benchmarks/rog.py [SETTING]... [--sheet FOLDER]``.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.inversion.inverting_gradients import InvertingGradients
from flpriv.attacks.inversion.latent_prior import LatentPrior
from flpriv.attacks.inversion.restoration import Restorer
from flpriv.attacks.inversion.rog import ROG
from flpriv.attacks.inversion.tuned_matching import TunedMatching
from flpriv.capture import Capture, Observation
from flpriv.claim import Reconstruction
from flpriv.clients.training import train
from flpriv.defense import Local
from flpriv.measures.images import all_correlations, mse, psnr
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import create
from flpriv.state import State, add, difference
from flpriv.task import Task
from flpriv.threat import threat

CLASSES, SIDE, SEARCH = 10, 64, 140
LEARNING: Mapping[str, Any] = {"simulated": 12, "training": 300}


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How sites train and what they do to their updates."""

    defenses: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    recipe: LocalRecipe = LocalRecipe(lr=0.05, batch_size=1, steps=1, train_mode=False)
    updates: int = 8


SETTINGS = {
    "qsgd, 16 levels": Setting(defenses=(("qsgd", {"levels": 16}),)),
    "top-k, 95 % dropped": Setting(defenses=(("top-k", {"keep": 0.05}),)),
    "sign-sgd": Setting(defenses=(("sign-sgd", {}),)),
    "gaussian": Setting(defenses=(("gaussian", {"max_grad_norm": 1.0, "noise_multiplier": 0.002}),)),
    "fedavg, 5 steps": Setting(recipe=LocalRecipe(lr=0.003, batch_size=1, steps=5, train_mode=False), updates=2),
}
"""The noise of ``gaussian`` has 1.6 times the norm of the update; five steps use one image each."""


@dataclass(frozen=True, kw_only=True)
class Xrays:
    """Images of patients the adversary may hold, and of all others."""

    public: Records
    private: Records


def xrays(folder: Path) -> Xrays:
    """X-rays of five sites, split by patient, in one fixed random order."""
    with (folder / "metadata.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    paths = [folder / row["path"] for row in rows]
    read = (np.asarray(Image.open(path).convert("L").resize((SIDE, SIDE)), dtype=np.float32) / 255 for path in paths)
    images = torch.stack([torch.from_numpy(image) for image in read])[:, None]
    owners = tuple(row["patient_id"] for row in rows)
    every = Records(images=images, labels=torch.arange(len(rows)) % CLASSES, patients=owners)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0)).tolist()
    drawn = torch.randperm(len(set(owners)), generator=torch.Generator().manual_seed(1)).tolist()[::7]
    held = {sorted(set(owners))[place] for place in drawn}
    public, private = ([i for i in order if (owners[i] in held) is wanted] for wanted in (True, False))
    return Xrays(public=every.take(public), private=every.take(private))


def federate(setting: Setting, data: Xrays) -> tuple[Capture, Records]:
    """One round, a site for each update; what the adversary holds, and the images behind it in the order of its claims."""
    task = Task(modality="xray", shape=(1, SIDE, SIDE), classes=tuple(map(str, range(CLASSES))), model="cnn")
    sent = {key: value.clone() for key, value in task.build(seed=0).state_dict().items()}
    each = (setting.recipe.steps or 1) * setting.recipe.batch_size
    seen, used = [], []
    for site in range(setting.updates):
        first = site * each
        labels = (torch.arange(each) + first) % CLASSES
        records = replace(data.private.take(range(first, first + each)), labels=labels)
        net = task.build()
        net.load_state_dict(sent)
        rows = [row for step in train(net, records, setting.recipe, classes=CLASSES, seed=site).steps for row in step]
        update: State = difference(net.state_dict(), sent)
        for name, options in setting.defenses:
            local = Local(site=f"site {site}", round=1, rng=torch.Generator().manual_seed(site))
            update = create("defenses", name, options).protect(update, local=local)
        reply = Observation(round=1, node=site, sent=sent, returned=add(sent, update), defenses=setting.defenses)
        seen.append(replace(reply, examples=each, local=setting.recipe, labels=records.labels[rows]))
        used.append(records.take(rows))
    granted = threat("honest-but-curious", grant=("know-labels", "know-order")).granted
    capture = Capture(granted=granted, task=task, observations=tuple(seen), public=data.public.anonymous())
    return capture, Records.concat(used)


def attacked(attack: Attack, capture: Capture) -> list[Tensor]:
    """The images claimed; in front of them, what a restoration network was given, where there is one."""
    given: list[Tensor] = []

    def note(module: torch.nn.Module, inputs: tuple[Tensor, ...], _: object) -> None:
        if isinstance(module, Restorer):
            given.append(inputs[0].clamp(0, 1))

    hook = torch.nn.modules.module.register_module_forward_hook(note)
    try:
        claims = [claim for claim in attack(capture) if isinstance(claim, Reconstruction)]
    finally:
        hook.remove()
    found = torch.cat([claim.images for claim in claims])
    return [torch.cat(given), found] if given else [found]


def measure(setting: Setting, data: Xrays, *, options: Mapping[str, Any] = LEARNING) -> dict[str, dict[str, Any]]:
    """PSNR, re-identification and processor seconds of every attack, its images under ``"images"``."""
    capture, used = federate(setting, data)
    unaware = replace(capture, observations=tuple(replace(one, defenses=()) for one in capture.observations))
    found: dict[str, dict[str, Any]] = {"originals": {"images": used.images}}
    coarse = SEARCH * 2 // 7
    ways: list[tuple[Sequence[str], Attack, Capture]] = [
        *(((f"plain, tv {tv}",), InvertingGradients(iterations=SEARCH, tv=tv), unaware) for tv in (0.2, 0.01)),
        (("l-bfgs",), TunedMatching(iterations=SEARCH, plan_name="lbfgs"), capture),
        (("rog", "rog, restored"), ROG(**options), capture),
        (
            ("latent prior", "latent prior, restored"),
            LatentPrior(coarse=coarse, iterations=SEARCH - coarse, **options),
            capture,
        ),
    ]
    for names, attack, view in ways:
        began = time.process_time()
        for name, images in zip(names, attacked(attack, view), strict=True):
            nearest = all_correlations(images, data.private.images).argmax(1).tolist()
            same = [data.private.patients[place] == owner for place, owner in zip(nearest, used.patients, strict=True)]
            quality = float(psnr(mse(images, used.images)).mean())
            spent = time.process_time() - began
            found[name] = {"psnr": quality, "re-identified": sum(same) / len(same), "seconds": spent, "images": images}
    return found


def sheet(found: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """A row of images for each attack, the originals on top."""
    rows = [torch.cat(list(one["images"][:10, 0]), 1) for one in found.values()]
    Image.fromarray((torch.cat(rows) * 255).round().byte().numpy()).save(path)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("settings", nargs="*", default=list(SETTINGS), choices=list(SETTINGS), metavar="SETTING")
    parser.add_argument("--sheet", type=Path, help="folder for contact sheets")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    images = xrays(Path(os.environ["FLPRIV_TEST_DATA"]) / "xray_multisite")
    for name in chosen.settings:
        done = measure(SETTINGS[name], images)
        if chosen.sheet:
            sheet(done, chosen.sheet / f"{name.split(',')[0]}.png")
        told = {way: {key: round(value, 2) for key, value in one.items() if key != "images"} for way, one in done.items()}
        print(json.dumps({name: told}, indent=1), flush=True)
