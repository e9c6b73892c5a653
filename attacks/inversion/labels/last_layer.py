"""The last layer, where labels show: an image of label y adds ``p - onehot(y)`` to the gradient of its bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.errors import FlprivError


@dataclass(frozen=True, kw_only=True)
class LastLayer:
    """Weights of the last layer, or their gradient.

    Args:
        weight: ``(classes, features)``, or ``None`` where the layer with the bias is no dense one.
        bias: ``(classes,)``, or ``None`` for a layer without.
    """

    weight: Tensor | None
    bias: Tensor | None

    def plus(self, other: LastLayer, *, times: float) -> LastLayer:
        """``self + times · other``, part by part."""
        parts = zip((self.weight, self.bias), (other.weight, other.bias), strict=True)
        weight, bias = (None if a is None or b is None else a + times * b for a, b in parts)
        return LastLayer(weight=weight, bias=bias)

    def scaled(self, factor: float) -> LastLayer:
        """``factor · self``."""
        return self.plus(self, times=factor - 1)

    def mark(self, feature: Tensor | None = None) -> Tensor:
        """``mean(p - onehot(y))`` over the images of a gradient, one number per class, ``(classes,)``.

        The bias holds it. It sums to zero: that gives back one entry lost to compression. Where more are lost, or without a bias,
        the rows of the weight are measured along ``feature`` ``(features,)``, the mean input of the layer, on the entries that
        stay; what is left of the bias sets the scale. Without ``feature`` rows are summed, and the scale is unknown.
        """
        if self.bias is not None:
            gone = self.bias == 0
            left = self.bias.sum()
            if not bool(gone.any()) or float(left.abs()) <= 1e-2 * float(self.bias.abs().max()):
                return self.bias
            if int(gone.sum()) == 1:
                return torch.where(gone, -left, self.bias)
            if feature is None or self.weight is None:
                return self.bias
            stay = (self.weight != 0).to(feature.dtype)
            rows = self.weight @ feature / (stay @ feature.square()).clamp_min(1e-12)
            kept = rows[~gone]
            return rows * float(kept @ self.bias[~gone]) / max(float(kept @ kept), 1e-12)
        assert self.weight is not None
        return self.weight.sum(1) if feature is None else self.weight @ feature / feature.square().sum().clamp_min(1e-12)


def names_of(entries: Mapping[str, Tensor], *, classes: int) -> tuple[str | None, str | None]:
    """The names of the last layer's weight and bias among the parameters of a model, in its order.

    Raises:
        FlprivError: if no layer ends in ``classes`` rows.
    """
    rows = [name for name, value in entries.items() if value.dim() in (1, 2) and len(value) == classes]
    if not rows:
        raise FlprivError(f"the model has no last layer of {classes} rows to read labels from; grant 'know-labels'")
    if entries[rows[-1]].dim() == 2:
        return rows[-1], None
    module = rows[-1].rpartition(".")[0]
    weights = [name for name in rows if entries[name].dim() == 2 and name.rpartition(".")[0] == module]
    return (weights[-1] if weights else None), rows[-1]


def layer_of(entries: Mapping[str, Tensor], *, classes: int) -> LastLayer:
    """The last layer's entries, on the CPU in float64.

    Raises:
        FlprivError: if no layer ends in ``classes`` rows.
    """
    weight, bias = (None if n is None else entries[n].detach().cpu().double() for n in names_of(entries, classes=classes))
    return LastLayer(weight=weight, bias=bias)


def marks_of(update: Mapping[str, Tensor], *, classes: int) -> Tensor:
    """One number per class, ``(classes,)``: the entries of the last layer's bias, or the row sums of its weight without one.

    ``update`` lists parameters in the model's order.

    Raises:
        FlprivError: if no layer ends in ``classes`` rows.
    """
    layer = layer_of(update, classes=classes)
    return LastLayer(weight=layer.weight, bias=None).mark() if layer.bias is None else layer.bias
