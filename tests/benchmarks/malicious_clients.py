"""What a malicious operator makes of many clients or large batches: ``loki``, ``fishing``, ``model-inconsistency``.

    python tests/benchmarks/malicious_clients.py [seeds, 5] [loki] [fishing] [inconsistency] [defences]

Real chest X-rays of 64 pixels from the folder named by FLPRIV_TEST_DATA, two classes, untrained models, labels unknown. An image
is recovered where a claim about its own client shows it at 30 dB or better, under the best one-to-one assignment; values are
means over seeds with their range. The null is the best of the public images for each private one.
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import math
import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flpriv.attack import Attack
from flpriv.attacks.malicious.fishing import Fishing, gradient
from flpriv.attacks.malicious.loki import Loki
from flpriv.attacks.malicious.model_inconsistency import ModelInconsistency
from flpriv.claim import Reconstruction
from flpriv.measures.images import all_mse
from flpriv.measures.images import psnr as decibels
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from tests.attacks.conftest import psnr
from tests.attacks.malicious.conftest import Rounds, parts, rounds
from tests.benchmarks.inversion_cases import xrays

STEP = LocalRecipe(lr=0.05, steps=1)
Defenses = Sequence[tuple[str, Mapping[str, Any]]]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an attack on one federation came to.

    Args:
        claimed: images claimed.
        quality: PSNR in dB of each image of the clients attacked, 0 for those nobody claims.
        nulls: PSNR in dB of the public image nearest to each.
        seconds: of the attack.
        refused: why clients refused the model.
    """

    claimed: int
    quality: Tensor
    nulls: Tensor
    seconds: float
    refused: tuple[str, ...] = ()

    @property
    def recovered(self) -> float:
        """Share of images at 30 dB or better."""
        return float((self.quality >= 30).double().mean())


def outcome(attack: Attack, done: Rounds, *, public: Records) -> Outcome:
    """Attack, and compare claims with the images of the clients they are about; a claim about a sum with all of them."""
    begin = time.perf_counter()
    claims = [one for one in attack(done.capture) if isinstance(one, Reconstruction)] if done.capture.observations else []
    seconds = time.perf_counter() - begin
    asked = {one.node for one in claims} or set(done.used)
    qualities = []
    for node in asked:
        truth = torch.cat([records.images for own, records in done.used.items() if node in (None, own)])
        images = [one.images for one in claims if one.node == node]
        qualities.append(psnr(torch.cat(images), truth) if images else torch.zeros(len(truth), dtype=torch.float64))
    truth = torch.cat([records.images for own, records in done.used.items() if own in asked or None in asked])
    return Outcome(
        claimed=sum(len(one.images) for one in claims),
        quality=torch.cat(qualities),
        nulls=decibels(all_mse(public.images, truth).amin(0)),
        seconds=seconds,
        refused=done.refused,
    )


@dataclass(frozen=True, kw_only=True)
class Bench:
    """Private images in another order for every seed, and public ones."""

    private: Records
    public: Records

    def sites(self, sizes: Sequence[int], *, seed: int) -> list[Records]:
        """So many records for each site."""
        order = torch.randperm(len(self.private), generator=torch.Generator().manual_seed(seed))
        return parts(self.private.take(order), sizes)

    def run(
        self, attack: Attack, sizes: Sequence[int], *, seed: int, recipe: LocalRecipe, defenses: Defenses = (), **more: Any
    ) -> tuple[Rounds, Outcome]:
        """Federate and attack."""
        sites = self.sites(sizes, seed=seed)
        done = rounds(attack, sites, recipe=recipe, public=self.public, seed=seed, defenses=defenses, **more)
        return done, outcome(attack, done, public=self.public)


def spread(values: Sequence[float], form: str = "{:.1f}") -> str:
    """Mean and range."""
    mean = sum(values) / len(values)
    return f"{form.format(mean)} [{form.format(min(values))}, {form.format(max(values))}]"


def loki(bench: Bench, seeds: int) -> None:
    """Clients told apart in one sum."""
    one, four = replace(STEP, batch_size=16), LocalRecipe(lr=0.01, batch_size=4, steps=4)
    cases: dict[str, tuple[Loki, int, int, LocalRecipe, dict[str, Any]]] = {
        "12 clients, 16 images each, 128 bins": (Loki(bins=128), 12, 16, one, {}),
        "12 clients, 16 images each, 256 bins": (Loki(), 12, 16, one, {}),
        "12 clients, 16 images each, 256 bins in one direction": (Loki(directions=1), 12, 16, one, {}),
        "12 clients, 16 images each, 256 bins, single replies": (Loki(), 12, 16, one, {"summed": False}),
        "4 clients, 16 images each, 256 bins, ResNet18 in train mode": (Loki(clients=4), 4, 16, one, {"model": "resnet18"}),
        "6 clients, 64 images each, 512 bins": (Loki(bins=512, clients=6), 6, 64, replace(one, batch_size=64), {}),
        "12 clients, four local steps on 4 images": (Loki(), 12, 16, four, {}),
        "12 clients, four local steps on 4 images, gain .3": (Loki(gain=0.3), 12, 16, four, {}),
    }
    for name, (attack, clients, images, recipe, more) in cases.items():
        found = [bench.run(attack, (images,) * clients, seed=seed, recipe=recipe, **more)[1] for seed in range(seeds)]
        weights = attack.bins * attack.clients * (bench.private.images[0].numel() + 1)
        print(
            f"loki, {name}: recovered {spread([100 * one.recovered for one in found])} %, "
            f"median {spread([float(one.quality.median()) for one in found])} dB, null {float(found[0].nulls.mean()):.1f} dB; "
            f"{weights / 1e6:.1f} M weights, {weights * 4 / 2**20:.0f} MiB; {found[-1].seconds:.1f} s, peak memory so far "
            f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB",
            flush=True,
        )


def fishing(bench: Bench, seeds: int) -> None:
    """Single images out of large batches, of one client and of a sum."""
    for images, clients, cuts in ((32, 1, 8), (64, 1, 8), (8, 4, 8), (32, 1, 4)):
        attack = Fishing(strategy="feature", rounds=tuple(range(1, cuts + 1)), crowd=images * clients, most=1)
        recipe = replace(STEP, batch_size=images, train_mode=False)
        found = [bench.run(attack, (images,) * clients, seed=seed, recipe=recipe, count=cuts) for seed in range(seeds)]
        best = [sorted(one.quality[one.quality > 0].tolist()) for _, one in found]
        every = [value for values in best for value in values]
        rest = [_rest(attack, done) for done, _ in found]
        print(
            f"fishing, {clients} client(s) of {images} images, {cuts} rounds: isolated {spread([len(v) for v in best])} images, "
            f"beside them {max(rest, default=0):.1e} of the gradient; {sum(v >= 30 for v in every)} of {len(every)} at 30 dB, "
            f"PSNR {spread(every) if every else '-'} dB, null {float(found[0][1].nulls.mean()):.1f} dB; "
            f"{sum(one.seconds for _, one in found) / max(1, len(every)):.1f} s an image",
            flush=True,
        )
    attack = Fishing(target=1, then_options={"iterations": 200})
    for shown, repeats in ((1, seeds), (2, 1)):
        found = []
        for seed in range(repeats):
            (site,) = bench.sites((32,), seed=seed)
            site = replace(site, labels=(torch.arange(32) < shown).long())
            done = rounds(attack, [site], recipe=replace(STEP, batch_size=32, train_mode=False), public=bench.public, seed=seed)
            found.append((done, outcome(attack, done, public=bench.public)))
        every = [value for _, one in found for value in one.quality[one.quality > 0].tolist()]
        print(
            f"fishing by class, {shown} of 32 images have it: PSNR {spread(every) if every else '-'} dB of {len(every)} images, "
            f"null {float(found[0][1].nulls.mean()):.1f} dB",
            flush=True,
        )


def _rest(attack: Fishing, done: Rounds) -> float:
    """How much of the difference of two rounds does not come from the image that is isolated, as a share of its norm, at most."""
    worst = 0.0
    for one in attack.isolate(done.capture.observations, done.capture.task):
        before, after = (done.capture.observations[one.round - place] for place in (2, 1))
        difference = {key: value - gradient(before)[key] for key, value in gradient(after).items()}
        below = [key for key in difference if not key.startswith("fc.")]
        records = Records.concat(list(done.used.values()))
        left = {key: difference[key].clone() for key in below}
        task, sizes = done.capture.task, []
        for image, label in zip(records.images, records.labels, strict=True):
            change = {key: torch.zeros_like(difference[key]) for key in below}
            for state, sign in ((before.sent, -1), (after.sent, 1)):
                model = task.build().eval()
                model.load_state_dict(dict(state))
                loss = torch.nn.functional.cross_entropy(model(image[None]), label[None]) / len(records)
                named = [(key, value) for key, value in model.named_parameters() if key in change]
                for (key, _), slope in zip(named, torch.autograd.grad(loss, [value for _, value in named]), strict=True):
                    change[key] += sign * slope
            sizes.append((math.sqrt(sum(float(value.square().sum()) for value in change.values())), change))
        largest = max(sizes, key=lambda pair: pair[0])
        for key in below:
            left[key] -= largest[1][key]
        worst = max(worst, math.sqrt(sum(float(value.square().sum()) for value in left.values())) / max(largest[0], 1e-30))
    return worst


def inconsistency(bench: Bench, seeds: int) -> None:
    """One client's update out of a sum."""
    labels = {"cnn": 10, "flpriv.testing:dense_net": 2, "resnet18": 2}
    for model, images, more in (
        ("cnn", 1, {"classes": 2}),
        ("cnn", 4, {"classes": labels["cnn"]}),
        ("flpriv.testing:dense_net", 8, {"options": {"inputs": 4096, "width": 512, "classes": 2}}),
    ):
        attack = ModelInconsistency(target=2)
        recipe, found, apart = replace(STEP, batch_size=images, train_mode=False), [], []
        for seed in range(seeds):
            sites = [replace(one, labels=torch.arange(images) % labels[model]) for one in bench.sites((images,) * 6, seed=seed)]
            done = rounds(attack, sites, recipe=recipe, model=model, public=bench.public, seed=seed, **more)
            (seen,), own = done.capture.observations, done.replies[2].update
            told = attack.isolate(done.capture, seen).update
            off = sum(float((told[key] - own[key]).double().square().sum()) for key in own)
            apart.append(math.sqrt(off / sum(float(value.double().square().sum()) for value in own.values())))
            found.append(outcome(attack, done, public=bench.public))
        print(
            f"model-inconsistency, {model}, 6 clients of {images} image(s): isolated to {max(apart):.1e} of the update; "
            f"recovered {spread([100 * one.recovered for one in found])} %, "
            f"median {spread([float(one.quality.median()) for one in found])} dB, null {float(found[0].nulls.mean()):.1f} dB",
            flush=True,
        )


def defences(bench: Bench, seeds: int) -> None:
    """Each attack against each defence."""
    from opacus.accountants.utils import get_noise_multiplier

    ladder = Fishing(strategy="feature", rounds=(1, 2, 3, 4), crowd=32, most=1, then_options={"iterations": 100})
    attacks: dict[str, tuple[Attack, tuple[int, ...], int, Callable[[int], LocalRecipe]]] = {
        "loki": (Loki(bins=128), (16,) * 12, 1, lambda images: replace(STEP, batch_size=images)),
        "fishing": (ladder, (32,), 4, lambda images: replace(STEP, batch_size=images, train_mode=False)),
        "model-inconsistency": (
            ModelInconsistency(then_options={"iterations": 300}),
            (1,) * 6,
            1,
            lambda images: replace(STEP, batch_size=images, train_mode=False),
        ),
    }
    print("\n| attack | defence | recovered | best PSNR, dB | null, dB |\n|---|---|---|---|---|")
    for name, (attack, sizes, count, recipe) in attacks.items():
        private = get_noise_multiplier(target_epsilon=8, target_delta=1e-5, sample_rate=1.0, steps=count)
        stacks: dict[str, Defenses] = {
            "none": (),
            "model-guard": (("model-guard", {}),),
            "clipping to 1": (("gaussian", {"noise_multiplier": 0.0}),),
            "gaussian, .0001": (("gaussian", {"noise_multiplier": 0.0001}),),
            "gaussian, .1": (("gaussian", {"noise_multiplier": 0.1}),),
            f"dp-sgd, epsilon 8 (noise {private:.2f})": (("dp-sgd", {"noise_multiplier": private}),),
        }
        for defence, stack in stacks.items():
            run = partial(bench.run, attack, sizes, recipe=recipe(sizes[0]), count=count, defenses=stack)
            _row(name, defence, [run(seed=seed)[1] for seed in range(seeds)])
        larger = tuple(4 * size for size in sizes[:6])
        found = [bench.run(attack, larger, seed=seed, recipe=recipe(larger[0]), count=count)[1] for seed in range(seeds)]
        _row(name, f"batches of {larger[0]} instead of {sizes[0]}", found)


def _row(attack: str, defence: str, found: Sequence[Outcome]) -> None:
    if refused := found[0].refused:
        print(f"| {attack} | {defence} | refused by {len(refused)}: {refused[0]} | | |", flush=True)
        return
    print(
        f"| {attack} | {defence} | {sum(int((one.quality >= 30).sum()) for one in found)} of "
        f"{sum(len(one.quality) for one in found)} | {max(float(one.quality.max()) for one in found):.1f} | "
        f"{float(found[0].nulls.mean()):.1f} |",
        flush=True,
    )


def main() -> None:
    """All parts, or those named."""
    torch.set_num_threads(1)
    given = sys.argv[1:]
    seeds = int(given[0]) if given and given[0].isdigit() else 5
    chosen = [name for name in given if not name.isdigit()]
    private, public = xrays(64)
    bench = Bench(private=private, public=public)
    every = {"loki": loki, "fishing": fishing, "inconsistency": inconsistency, "defences": defences}
    for name, part in every.items():
        if not chosen or name in chosen:
            part(bench, seeds)


if __name__ == "__main__":
    main()
