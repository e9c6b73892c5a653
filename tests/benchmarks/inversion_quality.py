"""How well updates of real images are inverted, at no more than 1000 evaluations of each.

    python tests/benchmarks/inversion_quality.py [updates of each case, 8] [--search] [case ...]

Prints for each case the mean PSNR and SSIM with 95 % intervals over patients and the better of two nulls (mean public image, best
of 128 public images). Labels are known, and their order where the name does not deny it: the contest of orders takes another 780
evaluations there, beyond the 1000; models are untrained and in eval mode. The attack is ``tuned-matching``, which computes what
can be computed and searches for the rest, the search chosen on public images first; with ``--search`` it searches only.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import resource
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flpriv.attack import Attack
from flpriv.attacks.inversion.tuned_matching import TunedMatching
from flpriv.recipe import LocalRecipe
from tests.benchmarks.inversion_cases import Case, case, nodules, row, xrays

FOUR = LocalRecipe(lr=0.01, steps=4, batch_size=1, train_mode=False)
FAST = replace(FOUR, lr=0.1)
SMALL = partial(case, model="cnn")
DEEP = partial(case, model="resnet18")
Make = Callable[[int], Case]

CASES: Mapping[str, Make] = {
    "small CNN, 64 px, batch 4": lambda n: SMALL(xrays(64), batch=4, updates=n),
    "small CNN, 32 px, batch 8": lambda n: SMALL(xrays(32), batch=8, updates=n),
    "small CNN, 64 px, batch 8, two classes": lambda n: SMALL(xrays(64), batch=8, updates=n, classes=2),
    "small 3D CNN, nodules 28, batch 1": lambda n: SMALL(nodules(28), batch=1, updates=n),
    "small 3D CNN, nodules 28, batch 4": lambda n: SMALL(nodules(28), batch=4, updates=n),
    "ResNet18, 32 px, batch 1": lambda n: DEEP(xrays(32), batch=1, updates=n),
    "ResNet18, 32 px, batch 4": lambda n: DEEP(xrays(32), batch=4, updates=n),
    "small CNN, 32 px, four steps, lr .01": lambda n: SMALL(xrays(32), batch=4, updates=n, recipe=FOUR),
    "small CNN, 32 px, four steps, lr .1": lambda n: SMALL(xrays(32), batch=4, updates=n, recipe=FAST),
    "small CNN, 32 px, four steps in unknown order, lr .01": lambda n: SMALL(
        xrays(32), batch=4, updates=n, recipe=FOUR, ordered=False
    ),
    "small CNN, 32 px, four steps in unknown order, lr .1": lambda n: SMALL(
        xrays(32), batch=4, updates=n, recipe=FAST, ordered=False
    ),
}


def main() -> None:
    """Attack every case, or those named."""
    torch.set_num_threads(1)
    given = [argument for argument in sys.argv[1:] if argument != "--search"]
    updates = int(given[0]) if given else 8
    for name in given[1:] or CASES:
        known = CASES[name](updates)
        attack: Attack = TunedMatching(exact="--search" not in sys.argv)
        start = time.perf_counter()
        finding = known.attack(attack)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        shown = ("mean PSNR", "mean SSIM", "fraction of updates inverted by")
        print(f"{name}, {updates} updates: {row(finding, shown)}", flush=True)
        print(f"    {seconds / updates:.1f} s an update, tuning included; peak memory so far {memory:.2f} GiB", flush=True)


if __name__ == "__main__":
    main()
