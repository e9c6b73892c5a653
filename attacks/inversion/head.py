"""What each image of a batch gave to the last dense layer, out of the gradient they gave together."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.func import jacfwd
from torch.nn.functional import one_hot

_STEPS = 60


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
    method. The scale of the gradients is left open, for sites that clip.

    Args:
        weight: ``(classes, F)`` as sent, float64.
        bias: ``(classes,)`` as sent.
        moved: gradient of the weight.
        pushed: gradient of the bias.
        labels: ``(N,)``; no more images than classes less one can be told apart.

    Returns:
        ``None`` where there are too many images, or the gradient is of a lower rank.
    """
    images, classes = len(labels), len(bias)
    if images >= classes:
        return None
    left, values, right = torch.linalg.svd(moved, full_matrices=False)
    if images > len(values) or not float(values[images - 1]) > 1e-5 * float(values[0]):
        return None
    left, right = left[:, :images], values[:images, None] * right[:images]
    hot = one_hot(labels, classes).to(moved)
    through = weight @ right.T

    def missed(trial: Tensor) -> Tensor:
        mixing, scale = trial[:-1].view(images, images), trial[-1].exp()
        logits = torch.linalg.solve(mixing, through.T) + bias
        sent = left @ mixing
        down = scale * (logits.softmax(1) - hot) / images
        return torch.cat([(sent.T - down).flatten(), sent.sum(1) - pushed])

    guess = (1 / classes - hot) / images
    factor = (pushed @ guess.sum(0) / guess.sum(0).square().sum()).clamp_min(torch.finfo(guess.dtype).tiny)
    trial, damping = torch.cat([(left.T @ (factor * guess).T).flatten(), factor.log()[None]]), 1e-3
    now = missed(trial)
    for _ in range(_STEPS):
        slope = jacfwd(missed)(trial)
        normal = slope.T @ slope
        held = damping * normal.diagonal() + 1e-14 * normal.trace()
        step = torch.linalg.solve(normal + held.diag(), -slope.T @ now)
        then = missed(trial + step)
        if bool(then.isfinite().all()) and float(then.norm()) < float(now.norm()):
            done = float(now.norm() - then.norm()) < 1e-9 * float(now.norm())
            trial, now, damping = trial + step, then, damping / 5
            if done:
                break
        else:
            damping *= 5
    mixing = trial[:-1].view(images, images)
    return Head(
        slopes=(left @ mixing).T,
        features=torch.linalg.solve(mixing, right),
        error=float(now.norm() / pushed.norm().clamp_min(1e-300)),
    )
