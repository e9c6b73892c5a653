"""Resampling and framing."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from flpriv.clients.sites.reading import resize, to_shape


@pytest.mark.parametrize("size", [(20, 30), (64, 64), (90, 200)])
def test_resize_agrees_with_pillow(size: tuple[int, int]) -> None:
    image = np.random.default_rng(0).random((1, 90, 70)).astype(np.float32)
    expected = np.asarray(Image.fromarray(image[0]).resize(size[::-1], Image.Resampling.BILINEAR))
    assert np.allclose(resize(image, size)[0], expected, atol=2e-3)


def test_volumes_are_antialiased_along_all_axes() -> None:
    checkers = (np.indices((24, 24, 24)).sum(axis=0) % 2).astype(np.float32)[None]
    for axis in range(3):
        size = tuple(8 if a == axis else 24 for a in range(3))
        assert resize(checkers, size).shape == (1, *size)
    small = resize(checkers, (6, 6, 6))
    assert small.shape == (1, 6, 6, 6) and np.allclose(small, 0.5, atol=0.02)
    ramp = np.broadcast_to(np.linspace(0, 1, 12, dtype=np.float32)[:, None, None], (12, 4, 5))[None]
    assert np.all(np.diff(resize(ramp, (5, 4, 5))[0, :, 0, 0]) > 0)


def test_fit_keeps_the_aspect_ratio_in_millimetres() -> None:
    wide = np.zeros((1, 10, 40), dtype=np.float32)
    wide[:, :, 15:25] = 1
    assert to_shape(wide, shape=(1, 10, 10), fit="crop").min() == 1
    padded = to_shape(wide, shape=(1, 40, 40), fit="pad")
    assert padded.sum() == pytest.approx(100) and padded[0, :15].max() == 0
    assert to_shape(wide, shape=(1, 10, 10), fit="stretch").mean() == pytest.approx(0.25, abs=0.01)
    thick = np.ones((1, 10, 40, 40), dtype=np.float32)
    assert to_shape(thick, shape=(1, 8, 8, 8), spacing=(4, 1, 1), fit="pad").min() == pytest.approx(1)
    assert to_shape(thick, shape=(1, 8, 8, 8), spacing=(1, 1, 1), fit="pad")[0, 0].max() == 0
