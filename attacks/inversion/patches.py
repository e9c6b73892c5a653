"""Which inputs of a convolution meet which of its weights where, in any number of dimensions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional

Convolution = nn.Conv1d | nn.Conv2d | nn.Conv3d


def meetings(layer: Convolution, size: Sequence[int]) -> Tensor:
    """``(K, P)`` the input, counted from 1, that weight k of a channel meets at output position p; 0 for padding.

    Args:
        layer: with zero padding and one group.
        size: of one channel of the inputs.

    Raises:
        ValueError: for a convolution of another kind.
    """
    if layer.groups != 1 or layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        raise ValueError("a convolution of one group, padded with a number of zeros, is needed")
    counted = torch.arange(1, prod(size) + 1).view(*size)
    padded = functional.pad(counted, [width for width in reversed(layer.padding) for _ in range(2)])
    outputs = [
        (length - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, dilation in zip(padded.shape, layer.kernel_size, layer.stride, layer.dilation, strict=True)
    ]
    rows = []
    for offset in product(*map(range, layer.kernel_size)):
        seen = padded
        for axis, (at, length) in enumerate(zip(offset, outputs, strict=True)):
            places = at * layer.dilation[axis] + layer.stride[axis] * torch.arange(length)
            seen = seen.index_select(axis, places)
        rows.append(seen.flatten())
    return torch.stack(rows)


def patches(inputs: Tensor, met: Tensor) -> Tensor:
    """``(N, C, K, P)`` what each weight meets, from inputs ``(N, C, *size)`` and :func:`meetings`."""
    padded = functional.pad(inputs.flatten(2), (1, 0))
    return padded[:, :, met]


def design(slopes: Tensor, met: Tensor, inputs: int) -> Tensor:
    """The gradient of the weights as a linear map of what one input channel took in, ``(O·K, N·inputs)``, the same for each.

    Args:
        slopes: ``(N, O, P)`` gradient of the loss in the outputs.
        met: :func:`meetings`.
        inputs: of one channel.
    """
    images, outputs = slopes.shape[:2]
    table = slopes.new_zeros((outputs, len(met), images, inputs + 1))
    for weight, row in enumerate(met):
        table[:, weight].index_add_(2, row, slopes.transpose(0, 1))
    return table[..., 1:].reshape(outputs * len(met), images * inputs)
