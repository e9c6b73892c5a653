"""What each image of a batch gave to the last dense layer, out of the gradient they gave together."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacfwd
from torch.nn.functional import one_hot

_STARTS, _STEPS = 20, 60
_FOUND = 1e-5
"""Part of the gradient of the bias left unexplained at which no further start is tried."""


@dataclass(frozen=True, kw_only=True)
class Head:
    """The last dense layer taken apart.

    Args:
        slopes: ``(N, classes)`` gradient of the mean loss in each image's logits.
        features: ``(N, F)`` what each image sent into the layer.
        error: part of the gradients left unexplained.
    """

    slopes: Tensor
    features: Tensor
    error: float


def take_apart(weight: Tensor, bias: Tensor, moved: Tensor, pushed: Tensor, labels: Tensor) -> Head | None:
    """The one way in which images of these labels can have sent these gradients.

    The gradient of the weight is a product of what each image sent up and down; what came down, ``pᵢ - onehot(yᵢ)``, follows from
    what went up by the softmax. That leaves ``N²`` unknowns for ``N · classes`` equations, solved by Levenberg and Marquardt's
    method from several starts; images of one label differ by their ``pᵢ`` alone. The scale of the gradients is left open, for
    sites that clip.

    Args:
        weight: ``(classes, F)`` as sent, float64.
        bias: ``(classes,)`` as sent.
        moved: gradient of the weight.
        pushed: gradient of the bias.
        labels: ``(N,)``; no more images than classes less one can be told apart.

    Returns:
        ``None`` where there are too many images, or the gradient is of another rank.
    """
    images, classes = len(labels), len(bias)
    if images >= classes:
        return None
    left, values, right = torch.linalg.svd(moved, full_matrices=False)
    if images > len(values) or not float(values[images - 1]) > 1e-6 * float(values[0]):
        return None
    if images < len(values) and float(values[images]) > 0.05 * float(values[images - 1]):
        return None
    left, right = left[:, :images], values[:images, None] * right[:images]
    hot = one_hot(labels, classes).to(moved)
    through = weight @ right.T

    def missed(trial: Tensor) -> Tensor:
        mixing, scale = trial[:-1].view(images, images), trial[-1].exp()
        logits = torch.linalg.solve_ex(mixing, through.T).result + bias
        sent = left @ mixing
        down = scale * (logits.softmax(1) - hot) / images
        return torch.cat([(sent.T - down).flatten(), sent.sum(1) - pushed])

    middle = (1 / classes - hot).sum(0) / images
    factor = (pushed @ middle / middle.square().sum()).clamp_min(torch.finfo(middle.dtype).tiny)
    found: list[tuple[float, Tensor]] = []
    for logits in _guesses(hot):
        first = left.T @ (factor * (logits.softmax(1) - hot) / images).T
        trial, error = _minimum(missed, torch.cat([first.flatten(), factor.log()[None]]))
        found.append((error / float(pushed.norm().clamp_min(1e-300)), trial))
        if found[-1][0] < _FOUND:
            break
    error, trial = min(found, key=lambda one: one[0])
    mixing = trial[:-1].view(images, images)
    return Head(slopes=(left @ mixing).T, features=torch.linalg.solve_ex(mixing, right).result, error=error)


def _guesses(hot: Tensor) -> Iterator[Tensor]:
    """Logits to start from: all alike, where labels tell images apart, then random ones."""
    rng = torch.Generator().manual_seed(0)
    if int(hot.sum(0).max()) == 1:
        yield torch.zeros_like(hot)
    for start in range(_STARTS):
        yield (0.3, 1.0)[start % 2] * torch.randn(hot.shape, generator=rng, dtype=hot.dtype)


def _minimum(missed: Callable[[Tensor], Tensor], trial: Tensor) -> tuple[Tensor, float]:
    """Where the norm of ``missed`` is least, near ``trial``, and that norm."""
    now, damping = missed(trial), 1e-3
    for _ in range(_STEPS):
        slope = jacfwd(missed)(trial)
        normal = slope.T @ slope
        held = damping * normal.diagonal() + 1e-14 * normal.trace()
        then = missed(after := trial - torch.linalg.solve_ex(normal + held.diag(), slope.T @ now).result)
        if bool(then.isfinite().all()) and float(then.norm()) < float(now.norm()):
            done = float(now.norm() - then.norm()) < 1e-9 * float(now.norm())
            trial, now, damping = after, then, damping / 5
            if done:
                break
        else:
            damping *= 5
    return trial, float(now.norm().nan_to_num(torch.inf))
