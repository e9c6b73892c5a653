"""The gradient of a dense layer as a mixture of as many images as it has dimensions, and the columns it is mixed with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flpriv.attacks.inversion.first_layer import FirstLayer

_GAP = 0.03
"""The first singular value of rounding is at most this share of the last one of an image."""
_SINGLE = 3e-7
"""Relative error of a gradient that was computed in float32."""


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """``D Xᵀ = left @ right`` for the images X ``(P, B)`` and what each sends to each neuron, D ``(M, B)``.

    There is a matrix Q ``(B, B)`` with ``D = left @ Q`` and ``Xᵀ = Q⁻¹ @ right``. All tensors are float64.

    Args:
        left: ``(M, B)``, one row for each neuron that says more than rounding.
        right: ``(B, P)``, orthonormal rows.
        ones: ``(B,)``, with ``left @ ones`` the gradient of the biases: the pixel that is 1 in every image.
        weight: ``(M, B)``, the weights sent, seen from within the images' space: neuron k answers ``weight[k] @ y + bias[k]`` to
            the image ``y @ right``.
        bias: ``(M,)``, the biases sent.
        neurons: ``(M,)`` which of the layer these are.
        noise: standard deviation of the rounding in an entry of ``left``, > 0.
    """

    left: Tensor
    right: Tensor
    ones: Tensor
    weight: Tensor
    bias: Tensor
    neurons: Tensor
    noise: float

    @property
    def images(self) -> int:
        """B."""
        return len(self.ones)

    @property
    def doubt(self) -> Tensor:
        """``(M,)`` share of each row of ``left`` that may be rounding."""
        doubt: Tensor = self.noise / self.left.norm(dim=1) + _SINGLE
        return doubt

    def read(self, kernels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Images ``(B, P)``, their D ``(M, B)``, and whether each neuron answers to each image ``(M, B)``, for Q up to scale."""
        inverse = torch.linalg.inv(kernels)
        scale = inverse @ self.ones
        places = inverse / scale[:, None]
        answers = self.weight @ places.T + self.bias[:, None]
        return places @ self.right, self.left @ kernels * scale, answers > 0


def mixture(moved: dict[str, Tensor], sent: dict[str, Tensor], layer: FirstLayer) -> Mixture | None:
    """The mixture behind the gradient of ``layer``, as many images as it has singular values above rounding.

    ``None`` where the singular values leave no gap: more images than half the neurons that moved, or noise.

    Args:
        moved: the gradient times a positive number, float64, with the weights and biases of ``layer``.
        sent: the same parameters as sent.
        layer: the first layer.
    """
    weight, bias = moved[f"{layer.name}.weight"], moved[f"{layer.name}.bias"]
    moving = weight.any(1)
    weight, bias = weight[moving], bias[moving]
    energy, columns = torch.linalg.eigh(weight @ weight.T)
    energy, columns = energy.flip(0), columns.flip(1)
    floor = len(energy) * torch.finfo(torch.float64).eps * float(energy[:1].sum())
    singular = energy.clamp_min(floor).sqrt()
    falls = (singular[1:] / singular[:-1])[: len(singular) // 2]
    if not len(falls) or not float(falls.min()) < _GAP:
        return None
    images = int(falls.argmin()) + 1
    columns, singular = columns[:, :images], singular[:images]
    mixed = columns.T @ weight
    free = (len(weight) - images) * (weight.shape[1] - images)
    noise = float((weight - columns @ mixed).norm()) / max(free, 1) ** 0.5
    left, right = columns * singular, mixed / singular[:, None]
    heard = left.norm(dim=1) > 100 * noise
    return Mixture(
        left=left[heard],
        right=right,
        ones=columns.T @ bias / singular,
        weight=sent[f"{layer.name}.weight"].double()[moving][heard] @ right.T,
        bias=sent[f"{layer.name}.bias"].double()[moving][heard],
        neurons=moving.nonzero().flatten()[heard],
        noise=noise,
    )
