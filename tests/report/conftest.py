"""A verdict with everything in it: two and three dimensions, defences, failures, hostile names, missing numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from flpriv.claim import Goal
from flpriv.finding import (
    Confusion,
    Event,
    Finding,
    Group,
    Level,
    Metric,
    Pair,
    Roc,
    SettingResult,
    SiteSummary,
    Verdict,
)
from flpriv.threat import threat

HOSTILE = "<script>alert(1)</script>"
FORMULA = "=HYPERLINK(1)"
SITES = ("Aachen", "Berlin", HOSTILE, FORMULA)

Image = NDArray[np.float32]


def chest(seed: int, size: int = 64) -> Image:
    """An X-ray of sorts: a body, two lungs, ribs, a heart."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j]
    image = 0.75 * (((x / 0.92) ** 2 + (y / 1.1) ** 2) < 1)
    for side in (-1, 1):
        width, height, shift = rng.uniform((0.26, 0.5, 0.36), (0.34, 0.66, 0.46))
        image = np.where(((x - side * shift) / width) ** 2 + (y / height) ** 2 < 1, 0.2, image)
    image = image + 0.1 * np.cos(y * rng.uniform(20, 28)) * (image < 0.5)
    image = np.where(((x - 0.13) / 0.3) ** 2 + ((y - 0.35) / 0.3) ** 2 < 1, 0.8, image)
    return np.asarray(np.clip(image + rng.normal(0, 0.02, image.shape), 0, 1), dtype=np.float32)[None]


def volume(seed: int, size: int = 24) -> Image:
    """A CT patch of sorts: a ball in a noisy cube, off its middle."""
    rng = np.random.default_rng(seed)
    z, y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j, -1 : 1 : size * 1j]
    centre = rng.uniform(-0.35, 0.35, 3)
    ball = ((x - centre[0]) ** 2 + (y - centre[1]) ** 2 + (z - centre[2]) ** 2) < rng.uniform(0.15, 0.4)
    return np.asarray(np.clip(0.2 + 0.6 * ball + 0.15 * z + rng.normal(0, 0.03, ball.shape), 0, 1), dtype=np.float32)[None]


def pair(original: Image, guess: Image, *, noise: float, seed: int, site: str, rank: int | None = 1) -> Pair:
    """A pair whose reconstruction is the original with noise; scored only roughly."""
    blurred = original + np.random.default_rng(seed).normal(0, noise, original.shape)
    made = np.clip(blurred, 0, 1).astype(np.float32)

    def psnr(other: Image) -> float:
        return float(-10 * np.log10(np.mean((original - other) ** 2)))

    return Pair(
        original=original,
        reconstruction=made,
        null=guess,
        psnr=psnr(made),
        ssim=max(0.0, 1 - 4 * noise),
        null_psnr=psnr(guess),
        null_ssim=0.41,
        site=site,
        rank=rank,
        rdlv=max(0.0, 1 - 4 * noise) / 0.38 - 1 if rank == 1 else None,
    )


def roc(strength: float, n: int = 400) -> Roc:
    """A curve of ``n`` members against ``n`` others, ``strength`` standard deviations apart."""
    rng = np.random.default_rng(3)
    inside, outside = rng.normal(strength, 1, n), rng.normal(0, 1, n)
    cut = np.sort(np.concatenate([inside, outside]))[::-1]
    fpr, tpr = ((outside[None] >= cut[:, None]).mean(1), (inside[None] >= cut[:, None]).mean(1))
    return Roc(fpr=np.array([0.0, *fpr]), tpr=np.array([0.0, *tpr]))


def recovered(value: float, low: float, high: float, n: int = 16) -> Metric:
    """The headline of a reconstruction."""
    return Metric(
        name="fraction at PSNR ≥ 30 dB", value=value, low=low, high=high, n=n, null=0.0, null_name="best of 128 public images"
    )


def auc(value: float, spread: float = 0.03) -> Metric:
    """The headline of a membership attack."""
    return Metric(name="AUC", value=value, low=value - spread, high=value + spread, n=800, null=0.5, null_name="chance")


def imprint() -> list[Finding]:
    """An active attack in 2D: critical without a defence, blurred by noise, refused by the guard; told by site."""
    flat = [pair(chest(i), chest(100 + i), noise=0.004 * (i + 1), seed=i, site=SITES[i % 4]) for i in range(8)]
    noisy = [pair(chest(i), chest(100 + i), noise=0.25, seed=i, site=SITES[i % 4], rank=9) for i in range(3)]
    lost = replace(noisy[0], reconstruction=np.zeros_like(noisy[0].original), psnr=6.1, ssim=0.02, rank=None)
    value = recovered(0.875, 0.62, 0.98, n=8)
    more = (
        value,
        Metric(
            name="mean PSNR",
            value=38.2,
            low=34.1,
            high=42.0,
            n=8,
            unit="dB",
            null=17.3,
            null_name="best of 128 public images",
            second_null=15.2,
            second_null_name="mean public image",
            note="above 100 dB counts as 100 dB",
        ),
        Metric(name="fraction of updates inverted by exact", value=0.75, low=0.2, high=0.99, n=4, note="3 of 4 updates"),
        Metric(name="mean MS-SSIM", value=None, note="images of 20 pixels hold no two scales"),
        Metric(name="mean SSIM", value=0.947, low=0.9, high=0.98, n=8, null=0.41, null_name="best of 128 public images"),
        Metric(name="re-identification, own patient first of 240", value=None, n=0, note="patients are not known"),
    )
    own = Finding(attack="imprint", name="imprint", goal=Goal.RECONSTRUCTION, setting="none--imprint")
    ok = replace(own, headline=value, metrics=more, level=Level.CRITICAL, threshold="half of the images or more are recovered")
    by_site = [
        replace(
            ok,
            site=site,
            headline=recovered(share, max(0.0, share - 0.4), min(1.0, share + 0.3), n=2),
            metrics=(),
            level=Level.CRITICAL if share >= 0.5 else Level.HIGH,
        )
        for site, share in zip(SITES, (1.0, 0.5, 1.0, 0.25), strict=True)
    ]
    defended = replace(
        ok,
        defense="gaussian",
        setting="gaussian--imprint",
        headline=recovered(0.0, 0.0, 0.37, n=8),
        metrics=(
            recovered(0.0, 0.0, 0.37, n=8),
            replace(more[1], value=12.1, low=11.0, high=13.0),
            replace(more[2], value=0.25, low=0.01, high=0.8, note="1 of 4 updates"),
        ),
        level=Level.NONE,
        threshold="no image is recovered beyond the null",
        pairs=(*noisy, lost),
    )
    guard = replace(
        own,
        defense="model-guard",
        setting="model-guard--imprint",
        status="refused",
        level=Level.NONE,
        threshold="refused: the attack could not be mounted",
        message="the model is not the agreed one: extra layer 'block.0.weight'",
    )
    only = ("Only 8 originals: the intervals are wide.",)
    return [replace(ok, pairs=tuple(flat), caveats=only), *by_site, defended, guard]


def inversion() -> list[Finding]:
    """A passive attack in 3D, and its failure under a defence."""
    volumes = tuple(pair(volume(i), volume(50 + i), noise=0.03 * (i + 1), seed=i, site=SITES[i]) for i in range(2))
    own = Finding(attack="inverting-gradients", name="inverting-gradients", goal=Goal.RECONSTRUCTION, setting="none")
    value = recovered(0.25, 0.07, 0.52)
    return [
        replace(own, headline=value, metrics=(value,), pairs=volumes, level=Level.HIGH, threshold="a tenth is recovered"),
        replace(own, defense="gaussian", setting="gaussian", status="failed", message=f"ValueError: {HOSTILE} diverged"),
    ]


def membership() -> list[Finding]:
    """A membership attack, undefended and defended, with a number the sample cannot resolve."""
    own = Finding(attack="loss-threshold", name="loss-threshold", goal=Goal.MEMBERSHIP, setting="none")
    note = "400 non-members; at least 1000 are needed"
    strict = Metric(name="TPR at 0.1 % FPR", value=None, n=400, null=0.001, null_name="chance", note=note)
    at_one = Metric(name="TPR at 1 % FPR", value=0.045, low=0.027, high=0.07, n=400, null=0.01, null_name="chance")
    plain, kept = auc(0.653), auc(0.512)
    return [
        replace(
            own,
            headline=plain,
            metrics=(plain, at_one, strict),
            roc=roc(0.6),
            groups=(
                Group(attribute="sex", value="F", members=180, others=190, auc=auc(0.71), strict=at_one),
                Group(attribute="age", value="80+", members=4, others=3, auc=replace(plain, value=None), strict=strict),
            ),
            level=Level.MEDIUM,
            threshold="AUC surely ≥ .60",
        ),
        replace(
            own,
            defense="gaussian",
            setting="gaussian",
            headline=kept,
            metrics=(kept, replace(at_one, value=0.012, low=0.004, high=0.03), strict),
            roc=roc(0.05),
            level=Level.NONE,
            threshold="AUC not distinguishable from chance",
        ),
    ]


def attribute() -> list[Finding]:
    """Site inference with its baselines, undefended and defended; a membership attack the threat model forbids; a bound."""
    counts = np.array([[31, 3, 4, 2], [5, 28, 2, 5], [2, 1, 36, 1], [0, 0, 0, 0]])
    baselines = {"majority class": 0.37, "untrained backbone": 0.41, "pixel statistics": 0.55}
    value = Metric(name="accuracy", value=0.792, low=0.7, high=0.86, n=120, null=0.55, null_name="pixel statistics")
    own = Finding(attack="site-features", name="site-features", goal=Goal.ATTRIBUTE, setting="none")
    plain = Confusion(classes=SITES, counts=counts, accuracy=0.792, baselines=baselines)
    kept = Confusion(classes=SITES, counts=counts.T + 9, accuracy=0.48, baselines=baselines)
    bound = Metric(name="epsilon, lower bound", value=1.3, low=1.3, n=200, null=2.0, null_name="claimed epsilon")
    return [
        replace(own, headline=value, metrics=(value,), confusion=plain, level=Level.MEDIUM, threshold="10 points or more"),
        replace(
            own,
            defense="gaussian",
            setting="gaussian",
            headline=replace(value, value=0.48, low=0.39, high=0.58),
            confusion=kept,
            level=Level.NONE,
            threshold="not distinguishable from the best baseline",
        ),
        Finding(
            attack="source",
            name="source-inference",
            goal=Goal.ATTRIBUTE,
            setting="none",
            status="not granted",
            level=Level.NONE,
            message="source-inference needs 'know-labels', which the threat model does not grant",
        ),
        Finding(
            attack="canaries",
            name="one-run",
            goal=Goal.PRIVACY_BOUND,
            setting="gaussian",
            defense="gaussian",
            headline=bound,
            metrics=(bound,),
            level=Level.LOW,
            threshold="measured epsilon above 0",
        ),
    ]


def setting(id: str, defense: str, trap: str, utility: float | None) -> SettingResult:
    """One federation."""
    low, high = (None, None) if utility is None else (utility - 0.04, utility + 0.03)
    note = "" if utility is not None else "no test records"
    value = Metric(name="balanced accuracy", value=utility, low=low, high=high, n=160, note=note)
    area = Metric(name="AUROC", value=None if utility is None else min(0.99, utility + 0.06), n=160, note=note)
    return SettingResult(
        id=id,
        defense=defense,
        trap=trap,
        recipe="1 step of batch 8, SGD, learning rate 0.05" if trap else "1 epoch of batch 16, SGD, learning rate 0.05",
        rounds=1 if trap else 5,
        utility=(value, area),
        train_utility=(replace(value, value=None if utility is None else utility + 0.08),),
        armed_utility=(replace(value, null=0.77, null_name="honest model"),) if trap else (),
        epsilon={name: 2.0 + place / 10 for place, name in enumerate(SITES)} if defense == "gaussian" else {},
        seconds=12.34,
        events=(Event(round=1, who=HOSTILE, what="refused: the model is not the agreed one"),) if "guard" in defense else (),
    )


def make_verdict() -> Verdict:
    """The whole verdict."""
    adversary = threat("malicious-server")
    return Verdict(
        title=f"Chest X-ray, four hospitals {HOSTILE}",
        sentence="A malicious-server adversary reaches a critical risk on the undefended federation: 'imprint' reaches fraction "
        "at PSNR ≥ 30 dB 88 %, against 0 % for best of 128 public images. 'gaussian' and 'model-guard' brought this attack down.",
        level=Level.CRITICAL,
        threat=adversary.name,
        adversary=tuple(adversary.lines()),
        task="xray, 1 x 64 x 64 pixels, classes normal, pneumonia, model cnn",
        sites=tuple(
            SiteSummary(
                name=name,
                patients=60 - 9 * i,
                train=80 - 10 * i,
                test=20,
                public=10,
                classes={"normal": 50, "pneumonia": 60 - 10 * i},
            )
            for i, name in enumerate(SITES)
        ),
        settings=(
            setting("none", "none", "", 0.86),
            setting("none--imprint", "none", "imprint", None),
            setting("gaussian", "gaussian", "", 0.79),
            setting("gaussian--imprint", "gaussian", "imprint", None),
            setting("model-guard", "model-guard", "", 0.86),
            setting("model-guard--imprint", "model-guard", "imprint", None),
        ),
        findings=tuple(sorted([*imprint(), *inversion(), *membership(), *attribute()], key=lambda finding: bool(finding.site))),
        caveats=("The attack 'inverting-gradients' failed on 'gaussian': the objective diverged.",),
        methods={
            "imprint": ("Reads images out of a planted linear layer.", "Fowl et al., Robbing the Fed, ICLR 2022"),
            "inverting-gradients": ("Searches for images whose gradient points the same way.", "Geiping et al., NeurIPS 2020"),
            "loss-threshold": ("Takes records with a small loss for members.", "Yeom et al., CSF 2018"),
            "site-features": (HOSTILE, ""),
            "gaussian": ("Clips each update and adds Gaussian noise.", "McMahan et al., ICLR 2018"),
        },
        provenance={
            "command": 'flpriv run xray.toml --set sites.root="$DATA" --out run',
            "seed": "7",
            "engine": "inline",
            "date": "2025-11-21 03:48 UTC",
            "flpriv": "0.1.0",
            "torch": "2.13",
        },
        scenario='name = "xray"\nseed = 7\n\n[attacks.imprint]\nbins = 128\n# <b>not bold</b> & so on\n',
    )


@pytest.fixture(scope="session")
def verdict() -> Verdict:
    """See :func:`make_verdict`."""
    return make_verdict()


@pytest.fixture(scope="session")
def small(verdict: Verdict) -> Iterator[Verdict]:
    """A verdict with next to nothing in it."""
    yield Verdict(
        title="small",
        sentence="No verdict: no attack gave a number.",
        level=Level.UNKNOWN,
        threat="model-user",
        adversary=("sees the final global model",),
        task="ct",
        sites=(),
        settings=(),
        findings=(),
    )
