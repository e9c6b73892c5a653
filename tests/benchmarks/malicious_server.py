"""How many images a malicious server takes from real updates, how long its read-out takes and how much memory.

    FLPRIV_TEST_DATA=… python tests/benchmarks/malicious_server.py [quality] [sums] [steps] [degraded] [volumes] [speed] [neurons]
        [study]

Without arguments everything is run. Shares are of all images of all sites, at PSNR ≥ 30 dB and SSIM ≥ .9, with 95 % intervals and
the better of both nulls.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from flpriv import data, scenario
from flpriv.attack import Attack
from flpriv.attacks.malicious.crossed_imprint import CrossedImprint
from flpriv.attacks.malicious.imprint import Imprint
from flpriv.capture import Observation
from flpriv.clients.sites.reading import read_image
from flpriv.finding import Finding
from flpriv.recipe import LocalRecipe
from flpriv.records import Records
from flpriv.registry import create
from tests.benchmarks.inversion_cases import nodules, xrays
from tests.benchmarks.malicious_cases import Armed, armed, metric

PLAIN, CROSSED = Imprint(bins=512), CrossedImprint(bins=512)


def row(name: str, findings: Sequence[Finding]) -> None:
    """One line: the mean share over all cases, and the interval and nulls of the first."""
    parts = [name.ljust(44)]
    for begins in ("fraction at PSNR", "fraction at SSIM", "lenient rule"):
        found = [metric(finding, begins) for finding in findings]
        share = sum(one.value or 0.0 for one in found) / len(found)
        null = sum(one.best_null or 0.0 for one in found) / len(found)
        first = found[0]
        spread = f"[{first.low:.3f}, {first.high:.3f}]" if first.low is not None and first.high is not None else ""
        parts.append(f"{begins} {share:.3f} {spread} null {null:.3f}")
    median = sum(metric(finding, "median PSNR").value or 0.0 for finding in findings) / len(findings)
    print("  ".join([*parts, f"median {median:.1f} dB"]), flush=True)


def quality() -> None:
    """One gradient of 64 X-rays, five batches, 512 neurons."""
    for size in (64, 224):
        private, public = xrays(size)
        for attack in (PLAIN, CROSSED):
            found = [armed(private, public, attack, batch=64, seed=seed).attack(attack) for seed in range(5)]
            row(f"{attack.name}, {size} px, batch 64", found)


def sums() -> None:
    """ResNet-18, four sites in one sum; twelve sites told apart."""
    for size, batch in ((64, 64), (224, 16)):
        private, public = xrays(size)
        for attack in (PLAIN, CROSSED):
            found = [
                armed(private, public, attack, model="resnet18", batch=batch, nodes=4, summed=True, seed=seed).attack(attack)
                for seed in range(2)
            ]
            row(f"{attack.name}, ResNet-18, {size} px, sum of 4 x {batch}", found)
    private, public = xrays(64)
    attack = CrossedImprint(bins=512, clients=12)
    found = [armed(private, public, attack, batch=16, nodes=12, summed=True, seed=seed).attack(attack) for seed in range(5)]
    row("crossed-imprint, sum of 12 x 16, attributed", found)


def steps() -> None:
    """Four local steps of 16 images each."""
    private, public = xrays(64)
    for lr in (1e-3, 1e-2, 1e-1):
        for attack in (PLAIN, CROSSED, CrossedImprint(gain=100.0)):
            recipe = LocalRecipe(lr=lr, steps=4, batch_size=16)
            found = [armed(private, public, attack, batch=64, recipe=recipe, seed=seed).attack(attack) for seed in range(5)]
            row(f"{attack.name} {getattr(attack, 'gain', '')}, 4 steps, lr {lr:g}", found)


def degraded() -> None:
    """What noise, clipping and compression of the update leave."""
    private, public = xrays(64)
    for name, change in CHANGES.items():
        for attack in (PLAIN, CrossedImprint(gain=1e-3), CrossedImprint(gain=1e-3, directions=1)):
            cases = [changed(armed(private, public, attack, batch=64, seed=seed), change) for seed in range(3)]
            row(f"{attack.name} {getattr(attack, 'directions', '')}, {name}", [case.attack(attack) for case in cases])


def volumes() -> None:
    """Whole CT volumes: eight nodule patches of 48³, five chests of 64³, 12 x 16 nodules of 28³ in one sum; with peak memory."""
    root = Path(os.environ["FLPRIV_TEST_DATA"]) / "ct_3d"
    patches = stack(sorted(file for file in (root / "nodules").glob("*.nii.gz") if "mask" not in file.name), 48)
    chests = stack(sorted(file for file in (root / "volumes").glob("*.nii.gz") if "total" not in file.name), 64)
    small, small_public = nodules(28)
    for attack in (Imprint(bins=128), CrossedImprint(bins=128)):
        case = armed(patches.take(range(8)), patches.take(range(8, 40)), attack, batch=8, modality="ct")
        row(f"{attack.name}, 8 patches of 48^3", [case.attack(attack)])
        case = armed(chests, stacked_public(patches, 64), attack, batch=5, modality="ct")
        row(f"{attack.name}, 5 chests of 64^3", [case.attack(attack)])
        size, peak = memory(case, attack)
        print(
            f"    update {size:.0f} MB, peak of the read-out above it {peak:.0f} MB, ratio {(size + peak) / size:.2f}", flush=True
        )
    for attack in (Imprint(bins=500), CrossedImprint(bins=500)):
        case = armed(small, small_public, attack, model="resnet18", batch=16, nodes=12, summed=True, modality="ct")
        row(f"{attack.name}, sum of 12 x 16 of 28^3", [case.attack(attack)])


def speed() -> None:
    """The read-out of a 77 M-parameter update beside reading that update once."""
    private, public = (coloured(records.take(range(count))) for records, count in zip(xrays(224), (64, 100), strict=True))
    case = armed(private, public, CROSSED, batch=64)
    weight = next(value for key, value in case.capture.observations[0].returned.items() if key.endswith("bins.weight"))
    print(f"update of {weight.numel() / 1e6:.0f} M parameters")
    readings: dict[str, Callable[[], object]] = {
        "sum": weight.sum,
        "copy": weight.clone,
        "to float64": weight.double,
        "read-out": lambda: CROSSED(case.capture),
    }
    seconds = {name: min(timed(work) for _ in range(5)) for name, work in readings.items()}
    for name in ("sum", "copy", "to float64"):
        print(f"    {seconds['read-out']:.3f} s, {name} {seconds[name]:.3f} s, ratio {seconds['read-out'] / seconds[name]:.2f}")
    size, peak = memory(case, CROSSED)
    print(f"    update {size:.0f} MB, peak of the read-out above it {peak:.0f} MB, ratio {(size + peak) / size:.2f}", flush=True)


def study() -> None:
    """The setting of the MIC-DKFZ study: the sum over six or twelve sites of 16 images, ResNet-18, no normalisation.

    Brain MRI and X-rays as RGB of 224 pixels; the slices of chest CTs, of which each site holds 16 of one volume.
    """
    cases = (
        ("6 x 16 MRI", folder("brain_mri_folder", "mri"), 6, "mri"),
        ("12 x 16 X-rays", folder("xray_folder", "xray"), 12, "xray"),
        ("12 x 16 slices of CT", slices(), 12, "ct"),
    )
    for name, source, nodes, modality in cases:
        for bins in (128, 500):
            published = create("attacks", "trap-weights", {"variant": "mic-dkfz", "neurons": bins, "read": "singly"})
            for attack in (published, Imprint(bins=bins), CrossedImprint(bins=bins)):
                case = armed(
                    *source,
                    attack,
                    model="resnet18",
                    batch=16,
                    nodes=nodes,
                    summed=True,
                    modality=modality,
                    shuffled=modality != "ct",
                    stem_stride=2,
                )
                row(f"{attack.name}, {bins} neurons, {name}", [case.attack(attack)])
                del case


def folder(name: str, modality: str) -> tuple[Records, Records]:
    """RGB images of 224 pixels in class folders: what sites train on, and public ones of other patients."""
    tables = {
        "name": "benchmark",
        "sites": {
            "source": "folder",
            "root": f"{os.environ['FLPRIV_TEST_DATA']}/{name}",
            "modality": modality,
            "size": 224,
            "channels": 3,
            "resplit": True,
            "split": {"test": 0.0, "public": 0.4, "seed": 1},
        },
    }
    which = scenario.parse(tables, root=Path.cwd())
    places = range(len(data.sites(which)))
    private, public = (Records.concat([data.records(which, place, split) for place in places]) for split in ("train", "public"))
    return private, public


def slices() -> tuple[Records, Records]:
    """Axial slices of chest CTs as RGB of 224 pixels, in order: three whole volumes for the sites, two as public ones."""
    root = Path(os.environ["FLPRIV_TEST_DATA"]) / "ct_3d" / "volumes"
    parts = []
    for file in sorted(root.glob("*.nii.gz")):
        depth = 30 if "A0002" in file.name else 64
        if "total" not in file.name:
            volume = read_image(file, shape=(1, depth, 224, 224), window=(-1000.0, 400.0), modality="ct")
            planes = torch.from_numpy(volume).transpose(0, 1)[: depth // 16 * 16]
            names = tuple(f"{file.name}/{place}" for place in range(len(planes)))
            parts.append(
                Records(images=planes, labels=torch.arange(len(planes)) % 2, ids=names, patients=(file.name,) * len(planes))
            )
    parts.sort(key=len)
    return coloured(Records.concat(parts[2:])), coloured(Records.concat(parts[:2]))


def neurons() -> None:
    """Sums of 6 x 16 and 12 x 16 X-rays by the number of neurons."""
    private, public = xrays(64)
    for nodes in (6, 12):
        for bins in (128, 256, 500, 1024):
            for attack in (Imprint(bins=bins), CrossedImprint(bins=bins)):
                found = [
                    armed(private, public, attack, batch=16, nodes=nodes, summed=True, seed=seed).attack(attack)
                    for seed in range(3)
                ]
                row(f"{attack.name}, {bins} neurons, sum of {nodes} x 16", found)


Change = Callable[[Observation, torch.Generator], dict[str, Tensor]]


def noised(share: float) -> Change:
    """Noise of ``share`` of each tensor's root mean square."""

    def change(seen: Observation, rng: torch.Generator) -> dict[str, Tensor]:
        return {
            key: value + share * value.square().mean().sqrt() * torch.randn(value.shape, generator=rng)
            for key, value in seen.update.items()
        }

    return change


def clipped(noise: float) -> Change:
    """Scaled to a norm of 1 at most, then noise of this standard deviation."""

    def change(seen: Observation, rng: torch.Generator) -> dict[str, Tensor]:
        size = float(torch.stack([value.double().square().sum() for value in seen.update.values()]).sum().sqrt())
        return {
            key: value / max(1.0, size) + noise * torch.randn(value.shape, generator=rng) for key, value in seen.update.items()
        }

    return change


def largest(share: float) -> Change:
    """The largest entries of each tensor."""

    def change(seen: Observation, rng: torch.Generator) -> dict[str, Tensor]:
        return {
            key: torch.where(value.abs() >= value.abs().flatten().topk(max(1, int(share * value.numel()))).values[-1], value, 0)
            for key, value in seen.update.items()
        }

    return change


CHANGES: dict[str, Change] = {
    "half precision": lambda seen, rng: {key: value.half().float() for key, value in seen.update.items()},
    "noise of 10 % of each RMS": noised(0.1),
    "noise of 1 % of each RMS": noised(0.01),
    "clipped to 1": clipped(0.0),
    "clipped to 1, noise 1e-6": clipped(1e-6),
    "clipped to 1, noise 1e-3": clipped(1e-3),
    "top 20 %": largest(0.2),
    "top 5 %": largest(0.05),
}


def changed(case: Armed, change: Change) -> Armed:
    """The same replies with their updates changed."""
    rng = torch.Generator().manual_seed(0)
    seen = tuple(
        replace(one, returned={**one.returned, **{key: one.sent[key] + value for key, value in change(one, rng).items()}})
        for one in case.capture.observations
    )
    return replace(case, capture=replace(case.capture, observations=seen))


def stack(files: Sequence[Path], size: int) -> Records:
    """Volumes of ``size`` voxels along each axis in the lung window, each of its own patient."""
    images = [read_image(file, shape=(1, size, size, size), window=(-1000.0, 400.0), modality="ct") for file in files]
    names = tuple(file.name for file in files)
    return Records(images=torch.from_numpy(np.stack(images)), labels=torch.arange(len(files)) % 2, ids=names, patients=names)


def stacked_public(records: Records, size: int) -> Records:
    """Volumes of another size, as side knowledge."""
    images = torch.nn.functional.interpolate(records.images, size=(size,) * 3, mode="trilinear", align_corners=False)
    return replace(records, images=images)


def coloured(records: Records) -> Records:
    """Gray images as RGB."""
    return replace(records, images=records.images.expand(-1, 3, -1, -1).contiguous())


def timed(work: Callable[[], object]) -> float:
    """Seconds it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def memory(case: Armed, attack: Attack) -> tuple[float, float]:
    """Size of the trap's layer, and how far the resident memory rises during the read-out, in MB (Linux)."""
    status = Path("/proc/self/status")

    def held(what: str) -> float:
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith(what)) / 1000

    weight = next(value for key, value in case.capture.observations[0].returned.items() if key.endswith("bins.weight"))
    Path("/proc/self/clear_refs").write_text("5")
    before = held("VmRSS")
    attack(case.capture)
    return weight.numel() * 4 / 1e6, held("VmHWM") - before


PARTS: dict[str, Callable[[], None]] = {
    "quality": quality,
    "sums": sums,
    "steps": steps,
    "degraded": degraded,
    "volumes": volumes,
    "speed": speed,
    "neurons": neurons,
    "study": study,
}

if __name__ == "__main__":
    torch.set_num_threads(1)
    for part in sys.argv[1:] or PARTS:
        print(f"{part}: {(PARTS[part].__doc__ or '').splitlines()[0]}", flush=True)
        PARTS[part]()
