"""First trials of a search, all in [0, 1]."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def uniform(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Each pixel uniform in [0, 1]."""
    return torch.rand(shape, generator=rng)


def grey(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
    """Mid grey with a little noise, so that no two images are the same."""
    return (0.5 + 0.1 * torch.randn(shape, generator=rng)).clamp(0, 1)


def tiled(side: int) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """One random patch of ``side`` pixels along each axis, repeated over the image (Wei et al. 2020, https://arxiv.org/abs/2004.10397)."""

    def start(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        patch = torch.rand((*shape[:2], *(min(side, length) for length in shape[2:])), generator=rng)
        repeats = [-(-length // min(side, length)) for length in shape[2:]]
        whole = patch.repeat(1, 1, *repeats)
        for axis, length in enumerate(shape[2:], start=2):
            whole = whole.narrow(axis, 0, length)
        return whole

    return start


def image(prior: Tensor, *, noise: float = 0.02) -> Callable[[tuple[int, ...], torch.Generator], Tensor]:
    """Every trial begins at ``prior`` ``(C, *spatial)``, e.g. the mean public image, with a little noise."""

    def start(shape: tuple[int, ...], rng: torch.Generator) -> Tensor:
        return (prior.cpu().expand(shape) + noise * torch.randn(shape, generator=rng)).clamp(0, 1)

    return start
