from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from flpriv.finding import Metric
from flpriv.measures.guesses import draw
from flpriv.measures.images import ms_ssim, mse, psnr, rdlv, ssim
from flpriv.measures.intervals import clopper_pearson
from flpriv.measures.recovery import Recovery
from flpriv.measures.scoring import score
from flpriv.records import Records
from flpriv.truth import Truth


def images(count: int, *, seed: int, side: int = 24) -> Tensor:
    """Ramps of many directions on a common spot, with a little noise."""
    rng = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(0, 1, side), torch.linspace(0, 1, side), indexing="ij")
    a, b = torch.rand(2, count, 1, 1, 1, generator=rng) * 0.5
    spot = 0.3 * torch.exp(-20 * ((x - 0.4) ** 2 + (y - 0.6) ** 2))
    made: Tensor = a * x + b * y + spot + 0.02 * torch.randn(count, 1, side, side, generator=rng)
    return made.clamp(0, 1)


def records(stack: Tensor, patients: tuple[str, ...]) -> Records:
    ids = tuple(f"{patient}-{i}" for i, patient in enumerate(patients))
    return Records(images=stack, labels=torch.zeros(len(stack), dtype=torch.long), ids=ids, patients=patients)


def federation(*, side: int = 24, patients: tuple[str, ...] = ("p0", "p1", "p2", "p3", "p4", "p5")) -> Truth:
    used = records(images(len(patients), seed=0, side=side), patients)
    public = records(images(12, seed=1, side=side), tuple(f"x{i}" for i in range(12)))
    return Truth(used={(1, 7): used}, site_of={7: "a"}, everyone=used, public=public)


def metrics(truth: Truth, claimed: Tensor) -> dict[str, Metric]:
    guesses = draw(truth, seed=0)
    scored = score({(1, 7): [claimed]}, truth, guesses)
    count = len(set(truth.used[1, 7].patients))
    return {metric.name: metric for metric in Recovery(scored=scored, guesses=guesses, patients=count, seed=0).metrics()}


def test_every_number_stands_beside_both_nulls() -> None:
    truth = federation(side=44)
    originals = truth.used[1, 7].images
    assert truth.public is not None
    found = metrics(truth, images(6, seed=5, side=44))
    near = truth.public.images[((originals[:, None] - truth.public.images[None]) ** 2).mean((2, 3, 4)).argmin(1)]
    mean = truth.public.images.mean(0).expand_as(originals)
    expected = {
        "mean PSNR": (psnr(mse(near, originals)), psnr(mse(mean, originals))),
        "PSNR gained over the mean image": (psnr(mse(near, originals)) - psnr(mse(mean, originals)), torch.zeros(6)),
        "mean SSIM": (ssim(near, originals), ssim(mean, originals)),
        "mean MS-SSIM, 3 of 5 scales": (ms_ssim(near, originals), ms_ssim(mean, originals)),
        "mean RDLV over the mean public image": (rdlv(ssim(near, originals), ssim(mean, originals)), torch.zeros(6)),
        "fraction at PSNR ≥ 30 dB": (psnr(mse(near, originals)) >= 30, psnr(mse(mean, originals)) >= 30),
        "fraction at SSIM ≥ 0.9": (ssim(near, originals) >= 0.9, ssim(mean, originals) >= 0.9),
    }
    for name, (best, average) in expected.items():
        metric = found[name]
        assert (metric.null_name, metric.second_null_name) == ("best of 12 public images", "mean public image")
        assert metric.null == pytest.approx(float(best.double().mean()), abs=1e-5), name
        assert metric.second_null == pytest.approx(float(average.double().mean()), abs=1e-5), name
    assert found["median PSNR"].null == pytest.approx(float(np.median(psnr(mse(near, originals)))), abs=1e-5)
    own = found["re-identification, own patient first of 6"]
    assert own.second_null == pytest.approx(1 / 6)
    assert own.second_null_name == "chance"
    assert all(metric.value is not None and metric.low is not None and metric.n == 6 for metric in found.values())


def test_exact_images_count_as_100_db_so_a_mean_stays_finite_and_a_median_says_what_most_are() -> None:
    truth = federation()
    originals = truth.used[1, 7].images
    half = originals.clone()
    half[:3] = 0
    found = metrics(truth, half)
    expected = psnr(mse(half, originals)).clamp(max=100)
    assert expected[3:].tolist() == [100.0] * 3
    assert found["mean PSNR"].value == pytest.approx(float(expected.mean()))
    assert "above 100 dB counts as 100 dB" in found["mean PSNR"].note
    assert found["median PSNR"].value == pytest.approx(float(np.median(expected)))
    nearly = metrics(truth, (originals.double() + 1e-6).float())
    assert nearly["mean PSNR"].value == 100
    assert nearly["mean PSNR"].high == 100
    one = half.clone()
    one[3:] = originals[3:] + 0.003
    middle = metrics(truth, one)["median PSNR"].value
    assert middle is not None
    assert middle < 60


def test_small_images_have_no_multiscale_similarity_and_it_is_said_why() -> None:
    truth = federation(side=20)
    found = metrics(truth, truth.used[1, 7].images)["mean MS-SSIM"]
    assert found.value is None
    assert found.note == "images of 20 pixels hold no two scales"
    large = metrics(federation(side=176, patients=("p0", "p1")), images(2, seed=4, side=176))
    assert large["mean MS-SSIM"].value is not None


def test_rdlv_leaves_out_originals_the_prior_tells_nothing_of_and_says_so() -> None:
    truth = federation()
    used = truth.used[1, 7]
    rng = torch.Generator().manual_seed(3)
    strange = used.images.clone()
    strange[:2] = torch.rand(2, 1, 24, 24, generator=rng)
    odd = Truth(used={(1, 7): records(strange, used.patients)}, everyone=used, public=truth.public)
    claimed = (strange + 0.02 * torch.randn(strange.shape, generator=rng)).clamp(0, 1)
    found = metrics(odd, claimed)["mean RDLV over the mean public image"]
    assert truth.public is not None
    prior = ssim(truth.public.images.mean(0).expand_as(strange), strange)
    assert (prior[:2] < 0.05).all()
    kept = (ssim(claimed, strange) - prior)[2:] / prior[2:]
    assert found.value == pytest.approx(float(kept.mean()), abs=1e-5)
    assert found.n == 4
    assert found.note == "2 of 6 originals left out: their SSIM with the prior is below 0.05"
    nobody = Truth(
        used={(1, 7): records(torch.rand(6, 1, 24, 24, generator=rng), used.patients)}, everyone=used, public=truth.public
    )
    empty = metrics(nobody, claimed)["mean RDLV over the mean public image"]
    assert (empty.value, empty.low, empty.n) == (None, None, 0)
    assert empty.note.startswith("6 of 6 originals left out")


def test_images_of_one_patient_widen_every_interval() -> None:
    apart = tuple(f"p{i}" for i in range(24))
    together = tuple(f"p{i // 6}" for i in range(24))
    for claimed in (lambda x: x, torch.zeros_like):
        alone = metrics(t := federation(patients=apart), claimed(t.used[1, 7].images))["fraction at PSNR ≥ 30 dB"]
        found = metrics(t := federation(patients=together), claimed(t.used[1, 7].images))["fraction at PSNR ≥ 30 dB"]
        hits = round(24 * (alone.value or 0))
        assert (alone.low, alone.high) == clopper_pearson(hits, 24)
        assert (found.low, found.high) == pytest.approx(clopper_pearson(hits // 6, 4))
    lost = images(24, seed=0)
    lost[:12] = images(12, seed=7)
    narrow, wide = (metrics(federation(patients=p), lost)["mean SSIM"] for p in (apart, together))
    assert narrow.low is not None and narrow.high is not None and wide.low is not None and wide.high is not None
    assert wide.high - wide.low > 1.2 * (narrow.high - narrow.low)
