"""Plots that follow the page's colours and ids, images that can be read back."""

from __future__ import annotations

import base64
import io
import re
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from flpriv.finding import Metric, Pair, Roc
from flpriv.report import figures

STEP = Roc(fpr=np.array([0.0, 0.0, 0.01, 1.0]), tpr=np.array([0.0, 0.2, 0.4, 1.0]))


def pixels(uri: str) -> np.ndarray:
    """The image behind a data URI."""
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.removeprefix("data:image/png;base64,")))))


def make_pair(shape: tuple[int, ...]) -> Pair:
    """A pair of noise."""
    rng = np.random.default_rng(0)
    original, made, null = (rng.random(shape, dtype=np.float32) for _ in range(3))
    return Pair(
        original=original, reconstruction=made, null=null, psnr=7.8, ssim=0.0, null_psnr=7.8, null_ssim=0.0, site="A", rank=None
    )


def test_roc_is_well_formed_with_its_own_ids_and_colours() -> None:
    drawn = figures.roc([("no defence", STEP), ("<b>$x_{", STEP)], id="run-1-roc", title="a & b")
    tree = ElementTree.fromstring(drawn)
    assert tree.findtext("title") == "a & b"
    assert "<b>$x_{" in (tree.findtext("desc") or "")
    texts = ["".join(text.itertext()) for text in tree.iter("text")]
    assert {"no defence", "chance", "<b>$x_{", "false positive rate", "100 %"} <= set(texts)
    ids = re.findall(r'\bid="([^"]*)"', drawn)
    assert ids and all(id.startswith("run-1-roc-") for id in ids) and len(ids) == len(set(ids))
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', drawn)
    assert used and set(used) <= set(ids)
    assert "var(--series-1)" in drawn and figures.SERIES[0] not in drawn
    assert "http" not in drawn and "<style" not in drawn and "<!--" not in drawn


def test_drawing_twice_gives_the_same() -> None:
    one, two = (figures.roc([("a", STEP)], id="x", title="t") for _ in range(2))
    assert one == two


def test_roc_without_a_single_false_positive() -> None:
    perfect = Roc(fpr=np.array([0.0, 0.0, 1.0]), tpr=np.array([0.0, 1.0, 1.0]))
    assert "<svg" in figures.roc([("a", perfect)], id="x", title="t")


def test_scatter_tells_each_point_in_words() -> None:
    share = Metric(name="accuracy", value=0.8, low=0.7, high=0.85)
    points = [
        figures.Point(attack="a", defense=defense, utility=share, leakage=Metric(name="AUC", value=value, null=0.5))
        for defense, value in (("no defence", 0.7), ("noise", 0.52))
    ]
    tree = ElementTree.fromstring(figures.scatter(points, id="x", title="t"))
    said = (tree.findtext("desc") or "").replace("\u00a0", " ")
    assert said == "a under no defence: leakage 0.700, utility 80 %; a under noise: leakage 0.520, utility 80 %"


def test_flat_images_come_back_exactly() -> None:
    pair = make_pair((1, 20, 30))
    views = figures.views(pair, limit=1_000_000)
    assert (views.width, views.height, views.slices, views.shrink) == (30, 20, 1, 1)
    original, made, _, difference = (pixels(view.uri) for view in views.views)
    assert np.abs(original / 255 - pair.original[0]).max() <= 0.5 / 255 + 1e-6
    assert np.abs(difference / 255 - np.abs(pair.original - pair.reconstruction)[0]).max() <= 0.5 / 255 + 1e-6
    assert not np.array_equal(original, made)


def test_colour_stays_colour() -> None:
    assert pixels(figures.views(make_pair((3, 16, 16)), limit=10**6).views[0].uri).shape == (16, 16, 3)


def test_volumes_stack_their_slices_and_show_three_planes() -> None:
    pair = make_pair((1, 6, 8, 10))
    views = figures.views(pair, limit=1_000_000)
    assert (views.width, views.height, views.slices) == (10, 8, 6)
    view = views.views[0]
    stack = pixels(view.uri)
    assert stack.shape == (48, 10)
    assert np.abs(stack[16:24] / 255 - pair.original[0, 2]).max() <= 0.5 / 255 + 1e-6
    (coronal, c), (sagittal, s) = view.planes
    assert (coronal, pixels(c).shape, sagittal, pixels(s).shape) == ("coronal", (6, 10), "sagittal", (6, 8))


@pytest.mark.parametrize("shape", [(1, 256, 256), (1, 48, 48, 48)])
def test_large_images_shrink_until_they_fit(shape: tuple[int, ...]) -> None:
    views = figures.views(make_pair(shape), limit=100_000)
    assert views.shrink > 1 and views.width == shape[-1] // views.shrink
    assert sum(len(view.uri) + sum(len(uri) for _, uri in view.planes) for view in views.views) <= 100_000


def test_a_missing_reconstruction_is_known() -> None:
    pair = make_pair((1, 16, 16))
    none = Pair(**{**vars(pair), "reconstruction": np.zeros_like(pair.original)})
    assert figures.views(none, limit=10**6).empty and not figures.views(pair, limit=10**6).empty
