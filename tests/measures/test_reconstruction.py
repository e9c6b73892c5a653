from __future__ import annotations

import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torch import Tensor

from flpriv.claim import Goal, Reconstruction
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Metric
from flpriv.measures import measure
from flpriv.measures.images import mse, psnr, ssim
from flpriv.measures.intervals import clopper_pearson
from flpriv.measures.reconstruction import PAIRS
from flpriv.records import Records
from flpriv.truth import Truth

judge = partial(measure, attack="a", name="b", goal=Goal.RECONSTRUCTION, setting="none", defense="none")
HEAD, LENIENT = "fraction at PSNR ≥ 30 dB", "lenient rule, MSE < 0.1 to the nearest original"


def anatomy(count: int, *, seed: int, shape: tuple[int, ...] = (20, 20)) -> Tensor:
    """Smooth images that share a common structure, as patients do."""
    rng = np.random.default_rng(seed)
    common = gaussian_filter(np.random.default_rng(99).normal(size=shape), 3)
    own = np.stack([gaussian_filter(rng.normal(size=shape), 2) for _ in range(count)])
    return torch.from_numpy((0.5 + 2 * common + 0.8 * own).clip(0, 1)).float()[:, None]


def records(images: Tensor, start: int, site: str) -> Records:
    names = tuple(f"p{start + i}" for i in range(len(images)))
    return Records(
        images=images,
        labels=torch.zeros(len(images), dtype=torch.long),
        ids=names,
        patients=names,
        attributes={"site": (site,) * len(images)},
    )


def federation(*, each: int = 12, shape: tuple[int, ...] = (20, 20)) -> Truth:
    """Two sites, one round, and public images of others."""
    images = anatomy(4 * each, seed=0, shape=shape)
    a, b = records(images[:each], 0, "a"), records(images[each : 2 * each], 100, "b")
    public = records(images[2 * each :], 1000, "")
    return Truth(used={(1, 7): a, (1, 8): b}, site_of={7: "a", 8: "b"}, everyone=Records.concat([a, b]), public=public)


def claim(images: Tensor, node: int | None = 7) -> Reconstruction:
    return Reconstruction(images=images, round=1, node=node)


def metric(finding: Finding, name: str) -> Metric:
    return next(m for m in finding.metrics if m.name.startswith(name))


def test_perfect_reconstructions_in_any_order_are_found() -> None:
    truth = federation()
    shuffled = truth.used[1, 7].images[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    overall, a, b = judge([claim(shuffled), claim(truth.used[1, 8].images.flip(0), 8)], truth)
    assert (overall.site, a.site, b.site) == ("", "a", "b")
    assert overall.headline == metric(overall, HEAD)
    assert overall.headline.value == 1
    assert (overall.headline.low, overall.headline.high) == clopper_pearson(24, 24)
    assert overall.headline.n == 24
    assert metric(overall, "mean PSNR").value == 100
    assert metric(overall, "mean SSIM").value == pytest.approx(1)
    assert metric(overall, "fraction at SSIM").value == 1
    assert metric(overall, "re-identification").value == 1
    assert all(pair.rank == 1 for pair in overall.pairs)
    assert overall.caveats == ()
    assert a.headline is not None
    assert a.headline.n == 12


def test_numbers_are_those_of_the_images_and_pairs_come_best_first() -> None:
    truth = federation()
    rng = torch.Generator().manual_seed(0)
    noise = torch.linspace(0.005, 0.2, 12)[:, None, None, None]
    noisy = (truth.used[1, 7].images + noise * torch.randn(12, 1, 20, 20, generator=rng)).clamp(0, 1)
    overall = judge([claim(noisy.flip(0))], truth)[0]
    quality = psnr(mse(noisy, truth.used[1, 7].images))
    assert metric(overall, "mean PSNR").value == pytest.approx(float(quality.mean()))
    assert metric(overall, HEAD).value == pytest.approx(float((quality >= 30).double().mean()))
    alike = ssim(noisy, truth.used[1, 7].images)
    assert metric(overall, "fraction at SSIM").value == pytest.approx(float((alike >= 0.9).double().mean()))
    assert [pair.psnr for pair in overall.pairs] == pytest.approx(sorted(quality.tolist(), reverse=True))
    assert np.allclose(overall.pairs[0].reconstruction, noisy[0].numpy())
    assert np.allclose(overall.pairs[0].original, truth.used[1, 7].images[0].numpy())
    low, high = metric(overall, "mean PSNR").low, metric(overall, "mean PSNR").high
    assert low is not None
    assert high is not None
    assert low < float(quality.mean()) < high


def test_nulls_are_the_nearest_public_image_and_the_mean_public_image() -> None:
    truth = federation()
    assert truth.public is not None
    originals, public = truth.used[1, 7].images, truth.public.images
    overall = judge([claim(torch.rand(12, 1, 20, 20, generator=torch.Generator().manual_seed(0)))], truth)[0]
    best = torch.stack([psnr(mse(public, one.expand_as(public))).max() for one in originals])
    found = metric(overall, "mean PSNR")
    assert found.null == pytest.approx(float(best.mean()))
    assert found.null_name == "best of 24 public images"
    gained = metric(overall, "PSNR gained")
    mean = psnr(mse(public.mean(0).expand_as(originals), originals))
    assert found.value is not None
    assert gained.value == pytest.approx(found.value - float(mean.mean()))
    pair = overall.pairs[0]
    assert pair.null_psnr == pytest.approx(
        float(psnr(mse(torch.from_numpy(pair.null)[None], torch.from_numpy(pair.original)[None])))
    )
    assert min(abs(pair.null_psnr - value) for value in best.tolist()) < 1e-4


def test_no_more_than_128_public_images_are_offered() -> None:
    truth = federation()
    many = records(anatomy(400, seed=5), 2000, "")
    overall = judge([claim(torch.zeros(1, 1, 20, 20))], replace(truth, public=many), seed=3)[0]
    drawn = torch.randperm(400, generator=torch.Generator().manual_seed(3))[:128]
    pool = many.images[drawn]
    best = torch.stack([psnr(mse(pool, one.expand_as(pool))).max() for one in truth.used[1, 7].images])
    found = metric(overall, "mean PSNR")
    assert found.null == pytest.approx(float(best.mean()))
    assert found.null_name == "best of 128 public images"


def test_black_images_and_empty_claims_recover_nothing() -> None:
    truth = federation()
    for images in (torch.zeros(12, 1, 20, 20), torch.zeros(0, 1, 20, 20)):
        overall = judge([claim(images)], truth)[0]
        assert metric(overall, HEAD).value == 0
        assert metric(overall, "re-identification").value == 0
        black = psnr(mse(torch.zeros_like(truth.used[1, 7].images), truth.used[1, 7].images))
        assert metric(overall, "mean PSNR").value == pytest.approx(float(black.mean()))
        assert any("no nearer" in caveat for caveat in overall.caveats)
    assert any("0 images for 12 originals" in caveat for caveat in overall.caveats)
    assert overall.pairs[0].rank is None
    assert not overall.pairs[0].reconstruction.any()


def test_an_original_without_a_reconstruction_is_a_failure_even_where_black_is_near() -> None:
    truth = federation()
    dark = replace(truth.used[1, 7], images=torch.zeros(12, 1, 20, 20))
    overall = judge([claim(torch.zeros(3, 1, 20, 20))], replace(truth, used={(1, 7): dark, (1, 8): truth.used[1, 8]}))[0]
    assert metric(overall, HEAD).value == pytest.approx(3 / 12)
    assert metric(overall, "fraction at SSIM").value == pytest.approx(3 / 12)


def test_guesses_do_not_beat_the_null_though_they_meet_the_lenient_rule() -> None:
    truth = federation(each=40)
    overall = judge([claim(anatomy(40, seed=7)), claim(anatomy(40, seed=8), 8)], truth)[0]
    head, quality, lenient, own = (metric(overall, name) for name in (HEAD, "mean PSNR", LENIENT, "re-identification"))
    assert head.value == 0
    assert quality.value is not None
    assert quality.null is not None
    assert quality.value < quality.null
    assert lenient.value is not None
    assert lenient.null is not None
    assert lenient.value > 0.4
    assert lenient.null > 0.4
    assert own.low is not None
    assert own.null is not None
    assert own.low <= own.null
    assert any("no nearer" in caveat for caveat in overall.caveats)


def test_guesses_on_real_xrays_meet_the_lenient_rule(test_data: Path) -> None:
    from monai.transforms.compose import Compose
    from monai.transforms.io.array import LoadImage
    from monai.transforms.spatial.array import Resize

    read = Compose([LoadImage(image_only=True, ensure_channel_first=True), Resize((64, 64))])
    files = sorted((test_data / "xray_multisite").rglob("*.png"))[::4][:150]
    images = torch.stack([torch.as_tensor(read(str(file)))[:1] for file in files]).float() / 255
    images = images[torch.randperm(150, generator=torch.Generator().manual_seed(0))].clamp(0, 1)
    used, public, guesses = records(images[:32], 0, "a"), records(images[32:100], 100, ""), images[100:150]
    truth = Truth(used={(1, 7): used}, site_of={7: "a"}, everyone=used, public=public)
    overall = judge([claim(guesses)], truth)[0]
    assert metric(overall, HEAD).value == 0
    lenient = metric(overall, LENIENT).value
    assert lenient is not None
    assert lenient > 0.3


def test_claims_about_a_sum_are_matched_with_all_records_of_the_round() -> None:
    truth = federation()
    everyone = torch.cat([truth.used[1, 8].images, truth.used[1, 7].images])
    overall, a, b = judge([claim(everyone, None)], truth)
    assert overall.headline is not None
    assert (overall.headline.value, overall.headline.n) == (1, 24)
    assert (a.site, b.site) == ("a", "b")
    assert b.headline is not None
    assert (b.headline.value, b.headline.n) == (1, 12)
    assert overall.caveats == ()


def test_records_two_nodes_share_in_a_round_count_once_in_a_sum() -> None:
    truth = federation()
    both = replace(truth, used={(1, 7): truth.used[1, 7], (1, 8): truth.used[1, 7]})
    overall = judge([claim(truth.used[1, 7].images, None)], both)[0]
    assert overall.headline is not None
    assert overall.headline.n == 12


def test_several_claims_about_one_update_are_matched_together_and_other_updates_left_out() -> None:
    truth = federation()
    images = truth.used[1, 7].images
    overall, *sites = judge([claim(images[:6]), claim(images[6:])], truth)
    assert overall.headline is not None
    assert (overall.headline.value, overall.headline.n) == (1, 12)
    assert [finding.site for finding in sites] == ["a"]
    assert overall.caveats[0] == "1 of 2 updates were attacked; the records behind the others are not counted."


def test_volumes_are_measured_too_and_a_bounded_number_of_pairs_is_kept() -> None:
    truth = federation(each=20, shape=(8, 12, 14))
    noisy = (truth.used[1, 7].images + 0.003 * torch.randn(20, 1, 8, 12, 14, generator=torch.Generator().manual_seed(0))).clamp(
        0, 1
    )
    overall, a = judge([claim(noisy)], truth)
    assert overall.headline is not None
    assert overall.headline.value == 1
    assert len(overall.pairs) == PAIRS
    assert len(a.pairs) == PAIRS // 4
    assert overall.pairs[0].original.shape == (1, 8, 12, 14)


def test_without_public_images_other_patients_are_the_null_never_the_patient_himself() -> None:
    truth = replace(federation(), public=None)
    overall = judge([claim(truth.used[1, 7].images)], truth)[0]
    found = metric(overall, "mean PSNR")
    assert found.null_name == "best of 24 other patients' images"
    assert found.null is not None
    assert found.null < 60
    with pytest.raises(ClaimError, match="set patients aside"):
        judge([claim(truth.used[1, 7].images)], replace(truth, everyone=None))


def test_a_recognisable_reconstruction_points_to_its_patient_though_no_pixel_is_right() -> None:
    truth = federation()
    faded = 0.3 + 0.2 * truth.used[1, 7].images
    overall = judge([claim(faded)], truth)[0]
    assert metric(overall, HEAD).value == 0
    own = metric(overall, "re-identification")
    assert own.name.endswith("own patient first of 24")
    assert own.value is not None
    assert own.value > 0.9


def test_nan_is_black_and_values_out_of_range_are_clipped() -> None:
    truth = federation()
    wild = truth.used[1, 7].images.clone()
    wild[0] = float("nan")
    wild[1] = torch.where(wild[1] > 0.5, 50.0, -50.0)
    overall = judge([claim(wild)], truth)[0]
    assert metric(overall, HEAD).value == pytest.approx(10 / 12)
    assert all(pair.reconstruction.min() >= 0 and pair.reconstruction.max() <= 1 for pair in overall.pairs)


def test_claims_that_do_not_fit_are_refused() -> None:
    truth = federation()
    with pytest.raises(ClaimError, match=r"shape \(1, 9, 9\), the originals are \(1, 20, 20\)"):
        judge([claim(torch.zeros(2, 1, 9, 9))], truth)
    with pytest.raises(ClaimError, match="round 1, node 9: that node trained on nothing"):
        judge([claim(torch.zeros(2, 1, 20, 20), 9)], truth)
    with pytest.raises(ClaimError, match="no node trained"):
        judge([Reconstruction(images=torch.zeros(2, 1, 20, 20), round=5, node=None)], truth)


def test_how_updates_were_inverted_and_whether_they_depend_on_images_is_told_over_all_and_by_site() -> None:
    truth = federation()
    images = truth.used[1, 7].images
    exact = replace(claim(images), method="exact: dense + ReLU", sensitivity=0.21)
    blind = replace(claim(images, 8), sensitivity=0.002)
    overall, a, b = judge([exact, blind], truth)
    inverted, depends = metric(overall, "fraction of updates inverted by exact"), metric(overall, "mean input sensitivity")
    assert (inverted.value, inverted.n, inverted.note) == (
        0.5,
        2,
        "1 of 2 updates was inverted by exact: dense + ReLU, as the attack says",
    )
    assert depends.value == pytest.approx(0.106)
    assert depends.n == 2
    assert [caveat for caveat in overall.caveats if "depends on the images" in caveat] == [overall.caveats[0]]
    assert not any("exact" in caveat for caveat in overall.caveats)
    assert metric(a, "mean input sensitivity").value == pytest.approx(0.21)
    assert metric(a, "fraction of updates inverted").value == 1
    assert metric(b, "mean input sensitivity").value == pytest.approx(0.002)
    assert not any(each.name.startswith("fraction of updates") for each in b.metrics)
    assert overall.headline == overall.metrics[0] == metric(overall, HEAD)


def test_few_patients_are_a_caveat_however_many_their_images() -> None:
    truth = federation()
    used = replace(truth.used[1, 7], patients=("one",) * 6 + ("two",) * 6)
    known = replace(truth, used={(1, 7): used}, everyone=used)
    overall, _ = judge([claim(used.images)], known)
    assert "Only 12 originals of 2 patients: the intervals are wide." in overall.caveats
    assert overall.headline is not None
    assert (overall.headline.low, overall.headline.high) == pytest.approx(clopper_pearson(2, 2))


def test_a_pair_tells_its_own_leakage() -> None:
    truth = federation(shape=(32, 32))
    assert truth.public is not None
    noisy = (truth.used[1, 7].images + 0.02 * torch.randn(12, 1, 32, 32, generator=torch.Generator().manual_seed(0))).clamp(0, 1)
    overall = judge([claim(noisy)], truth)[0]
    for pair in overall.pairs:
        prior = float(ssim(truth.public.images.mean(0)[None], torch.from_numpy(pair.original)[None]))
        assert pair.rdlv == pytest.approx((pair.ssim - prior) / prior, abs=1e-5)


@pytest.mark.parametrize("shape", [(128, 128), (32, 32, 32)])
def test_hundreds_of_originals_take_seconds(shape: tuple[int, ...]) -> None:
    rng = torch.Generator().manual_seed(0)
    images = torch.rand(300, 1, *shape, generator=rng)
    used = records(images[:128], 0, "a")
    everyone = records(images, 0, "a")
    truth = Truth(used={(1, 7): used}, site_of={7: "a"}, everyone=everyone, public=records(images[200:], 1000, ""))
    begun = time.process_time()
    judge([claim(torch.rand(256, 1, *shape, generator=rng))], truth)
    assert time.process_time() - begun < 20
