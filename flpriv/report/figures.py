"""Figures for the page: plots as inline SVG that follows the reader's colours, images as PNG data URIs."""

from __future__ import annotations

import base64
import io
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flpriv.finding import Metric, Pair, Roc
from flpriv.report.tables import is_share, number

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010203", "#040506", "#070809"
SERIES = ("#0a0b01", "#0a0b02", "#0a0b03", "#0a0b04", "#0a0b05", "#0a0b06")
_THEME = {INK: "var(--ink)", MUTED: "var(--muted)", GRID: "var(--line)"} | {
    color: f"var(--series-{place})" for place, color in enumerate(SERIES, 1)
}
"""Stand-ins that matplotlib draws with, and the page's own colours that replace them."""

_DASHES = ("solid", (0, (5, 2)), (0, (2, 1.5)), (0, (6, 2, 1.5, 2)), (0, (1, 1.2)), (0, (8, 3)))
_MARKERS = ("o", "s", "^", "D", "P", "X", "v", "p")
_WIDTH, _HEIGHT, _LEGEND_ROW = 5.4, 3.9, 0.23


@dataclass(frozen=True, kw_only=True)
class Point:
    """One attack under one defence: what leaks, and what the model is worth."""

    attack: str
    defense: str
    utility: Metric
    leakage: Metric


@dataclass(frozen=True, kw_only=True)
class View:
    """One image of a pair as the page shows it.

    Args:
        name: ``"original"``, ``"reconstruction"``, ``"null"`` or ``"difference"``.
        uri: PNG data URI; of a volume, all axial slices one below the other.
        planes: (name, PNG data URI) of the middle coronal and sagittal slices, empty in 2D.
    """

    name: str
    uri: str
    planes: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Views:
    """A pair as the page shows it.

    Args:
        views: original, reconstruction, null and absolute difference of the first two.
        width: of one shown slice, pixels.
        height: likewise.
        slices: shown slices, 1 in 2D.
        shrink: pixels (voxels) averaged along each axis, 1 for full resolution.
        empty: no claim was assigned to the original.
    """

    views: tuple[View, ...]
    width: int
    height: int
    slices: int
    shrink: int
    empty: bool


def roc(series: Sequence[tuple[str, Roc]], *, id: str, title: str) -> str:
    """Log-log ROC curves with the chance line, as inline SVG. Rates of zero sit on the lower and left edge."""
    floor = _floor(curve for _, curve in series)
    columns = _columns(label for label, _ in series)
    with _figure(rows=math.ceil((len(series) + 1) / columns), salt=id) as (figure, axes):
        axes.plot([floor, 1], [floor, 1], color=MUTED, linewidth=1, linestyle=(0, (1, 2)), label="chance")
        for place, (label, curve) in enumerate(series):
            x, y = np.maximum(curve.fpr, floor), np.maximum(curve.tpr, floor)
            width = 2.2 if place == 0 else 1.7
            axes.plot(x, y, color=_color(place), linestyle=_DASHES[place % len(_DASHES)], linewidth=width, label=_short(label))
        axes.set(xscale="log", yscale="log", xlim=(floor, 1), ylim=(floor, 1.1))
        axes.set(xlabel="false positive rate", ylabel="true positive rate")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(lambda value, _: f"{100 * value:g} %")
        figure.legend(loc="outside lower left", ncols=columns)
        labels = ", ".join(label for label, _ in series)
        return _svg(figure, id=id, title=title, text=f"True against false positive rate, both logarithmic, for: {labels}.")


def scatter(points: Sequence[Point], *, id: str, title: str) -> str:
    """Leakage against utility with 95 % intervals, as inline SVG: colour is the attack, marker the defence, tick the null."""
    attacks = list(dict.fromkeys(point.attack for point in points))
    labels = list(dict.fromkeys(point.defense for point in points))
    columns = _columns([*attacks, *labels])
    with _figure(rows=math.ceil((len(attacks) + len(labels) + 1) / columns), salt=id) as (figure, axes):
        for point in points:
            color, x, y = _color(attacks.index(point.attack)), _value(point.utility), _value(point.leakage)
            axes.errorbar(x, y, xerr=_spread(point.utility), yerr=_spread(point.leakage), color=color, linewidth=1, capsize=2)
            marker = _MARKERS[labels.index(point.defense) % len(_MARKERS)]
            axes.plot(x, y, marker=marker, color=color, markersize=8, markeredgecolor=INK, markeredgewidth=0.6, linestyle="none")
            if point.leakage.null is not None:
                axes.plot(x, point.leakage.null, marker="_", color=color, markersize=12, markeredgewidth=1.6, linestyle="none")
        for place, attack in enumerate(attacks):
            axes.plot([], [], color=_color(place), linewidth=5, label=_short(attack))
        for place, label in enumerate(labels):
            axes.plot(
                [], [], marker=_MARKERS[place % len(_MARKERS)], color=MUTED, markersize=7, linestyle="none", label=_short(label)
            )
        axes.plot(
            [], [], marker="_", color=MUTED, markersize=12, markeredgewidth=1.6, linestyle="none", label="null of the attack"
        )
        axes.margins(0.12)
        axes.locator_params(nbins=6)
        for axis, metric in ((axes.xaxis, points[0].utility), (axes.yaxis, points[0].leakage)):
            axis.set_major_formatter(_ticks(metric))
        axes.set(xlabel=_short(f"utility: {points[0].utility.name}"), ylabel=_short(f"leakage: {points[0].leakage.name}"))
        figure.legend(loc="outside lower left", ncols=columns)
        return _svg(figure, id=id, title=title, text="; ".join(map(_said, points)))


def views(pair: Pair, *, limit: int) -> Views:
    """The four images of a pair, averaged down until they fit into ``limit`` bytes of data URIs together."""
    difference = np.abs(pair.original - pair.reconstruction)
    images = {"original": pair.original, "reconstruction": pair.reconstruction, "null": pair.null, "difference": difference}
    longest = max(pair.original.shape[1:])
    shrink = 1
    while True:
        small = {name: _shrunk(image, shrink) for name, image in images.items()}
        made = tuple(_view(name, image) for name, image in small.items())
        size = sum(len(view.uri) + sum(len(uri) for _, uri in view.planes) for view in made)
        if size <= limit or longest // (shrink + 1) < 16:
            break
        shrink += 1
    shape = small["original"].shape[1:]
    return Views(
        views=made,
        width=shape[-1],
        height=shape[-2],
        slices=shape[0] if len(shape) == 3 else 1,
        shrink=shrink,
        empty=not pair.reconstruction.any(),
    )


def png(image: NDArray[np.float32]) -> str:
    """A PNG data URI of an image ``(C, H, W)`` in [0, 1]: colour for three channels, else the first channel in grey."""
    from PIL import Image

    pixels = np.clip(np.nan_to_num(image) * 255 + 0.5, 0, 255).astype(np.uint8)
    made = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)) if len(pixels) == 3 else pixels[0])
    content = io.BytesIO()
    made.save(content, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(content.getvalue()).decode()


def _view(name: str, image: NDArray[np.float32]) -> View:
    if image.ndim == 3:
        return View(name=name, uri=png(image))
    channels, depth, height, width = image.shape
    planes = (("coronal", png(image[:, :, height // 2])), ("sagittal", png(image[:, :, :, width // 2])))
    return View(name=name, uri=png(image.reshape(channels, depth * height, width)), planes=planes)


def _shrunk(image: NDArray[np.float32], factor: int) -> NDArray[np.float32]:
    """Means over blocks of ``factor`` along every spatial axis that is long enough; what remains at the edge is cut."""
    for axis in range(1, image.ndim):
        if factor > 1 and (blocks := image.shape[axis] // factor) > 0:
            cut = np.take(image, np.arange(blocks * factor), axis=axis)
            image = cut.reshape(*image.shape[:axis], blocks, factor, *image.shape[axis + 1 :]).mean(
                axis=axis + 1, dtype=np.float32
            )
    return image


def _floor(curves: Iterable[Roc]) -> float:
    """The lower end of both axes: the decade below the smallest false positive rate that some curve resolves."""
    steps = [float(curve.fpr[curve.fpr > 0].min()) for curve in curves if (curve.fpr > 0).any()]
    return 10.0 ** min(-1, max(-5, math.floor(math.log10(min(steps, default=0.01)))))


@contextmanager
def _figure(*, rows: int, salt: str) -> Iterator[tuple[Figure, Axes]]:
    """A figure with room for ``rows`` of legend below the plot, drawn in the stand-in colours."""
    import matplotlib
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "text.parse_math": False, "font.size": 9.5, "legend.fontsize": 9.5,
        "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": MUTED, "axes.facecolor": "none", "legend.frameon": False,
        "xtick.color": MUTED, "ytick.color": MUTED, "xtick.labelcolor": INK, "ytick.labelcolor": INK, "grid.color": GRID,
        "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
        "xtick.minor.visible": False, "ytick.minor.visible": False,
    }  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(_WIDTH, _HEIGHT + _LEGEND_ROW * rows), layout="constrained", facecolor="none")
        yield figure, figure.add_subplot()


def _svg(figure: Figure, *, id: str, title: str, text: str) -> str:
    """The figure as inline SVG: text stays text, ids begin with ``id``, colours are the page's, nothing points outside."""
    from markupsafe import escape

    content = io.StringIO()
    figure.savefig(content, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    drawn = content.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    drawn = re.sub(r"<style[^>]*>.*?</style>|<metadata>.*?</metadata>|<!--.*?-->", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'\b(id="|(?:xlink:)?href="#|url\(#)', lambda found: found[1].replace("xlink:", "") + id + "-", drawn)
    drawn = re.sub(r"#[0-9a-f]{6}\b", lambda found: _THEME.get(found[0], found[0]), drawn)
    box = re.search(r'viewBox="([^"]*)"', drawn)
    assert box is not None
    head = (
        f'<svg class="plot" role="img" viewBox="{box[1]}" aria-labelledby="{id}-title {id}-text">'
        f'<title id="{id}-title">{escape(title)}</title><desc id="{id}-text">{escape(text)}</desc>'
    )
    return re.sub(r"<svg[^>]*>", lambda _: head, drawn, count=1)


def _said(point: Point) -> str:
    leakage, utility = (number(metric.value, metric) for metric in (point.leakage, point.utility))
    return f"{point.attack} under {point.defense}: leakage {leakage}, utility {utility}"


def _color(place: int) -> str:
    return SERIES[place % len(SERIES)]


def _columns(labels: Iterable[str]) -> int:
    """Columns of a legend: two unless a label is long."""
    return 2 if max(map(len, labels), default=0) <= 24 else 1


def _short(text: str) -> str:
    return textwrap.shorten(text, 56, placeholder=" …") if " " in text else text[:56]


def _value(metric: Metric) -> float:
    assert metric.value is not None
    return metric.value


def _spread(metric: Metric) -> NDArray[np.float64] | None:
    if metric.low is None or metric.high is None:
        return None
    value = _value(metric)
    return np.array([[max(0.0, value - metric.low)], [max(0.0, metric.high - value)]])


def _ticks(metric: Metric) -> Callable[[float, float], str]:
    if is_share(metric):
        return lambda value, _: f"{100 * value:g} %".replace("-", "−")
    return lambda value, _: f"{value:g}".replace("-", "−")
