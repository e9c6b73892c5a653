"""Training of small networks on public images: random crops, and a loop that depends on its seed alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from flpriv.progress import tell


def crops(stacks: Sequence[Tensor], *, count: int, side: int, rng: torch.Generator) -> list[Tensor]:
    """``count`` random crops, the same place, mirroring and intensity from every stack of ``(M, C, *spatial)``.

    Axes are mirrored with an even chance each; intensity is stretched and shifted so that [0, 1] stays about [0, 1].

    Args:
        stacks: images that belong together row by row, in [0, 1].
        count: how many.
        side: of a crop along each axis; shorter axes stay whole.
        rng: of everything.
    """
    spatial = stacks[0].shape[2:]
    taken: list[list[Tensor]] = [[] for _ in stacks]
    for _ in range(count):
        row = int(torch.randint(len(stacks[0]), (), generator=rng))
        sizes = [min(side, length) for length in spatial]
        firsts = [int(torch.randint(length - size + 1, (), generator=rng)) for length, size in zip(spatial, sizes, strict=True)]
        mirrored = [axis + 1 for axis in range(len(spatial)) if torch.rand((), generator=rng) < 0.5]
        low, high = 0.1 * torch.rand(2, generator=rng)
        for place, stack in enumerate(stacks):
            part = stack[row]
            for axis, (first, size) in enumerate(zip(firsts, sizes, strict=True), start=1):
                part = part.narrow(axis, first, size)
            taken[place].append(low + (1 - low - high) * part.flip(mirrored))
    return [torch.stack(one) for one in taken]


def padded(images: Tensor, multiple: int) -> Tensor:
    """``(N, C, *spatial)`` continued at the far edges until every side is a whole ``multiple``."""
    short = [-length % multiple for length in images.shape[2:]]
    widths = [width for length in reversed(short) for width in (0, length)]
    return functional.pad(images, widths, mode="replicate") if any(short) else images


def cropped(images: Tensor, spatial: Sequence[int]) -> Tensor:
    """The near corner of ``(N, C, *spatial)``: what :func:`padded` added is taken off."""
    for axis, length in enumerate(spatial, start=2):
        images = images.narrow(axis, 0, length)
    return images


def fit(net: nn.Module, loss: Callable[[], Tensor], *, steps: int, lr: float, what: str) -> None:
    """Adam down a cosine from ``lr`` to zero."""
    optimiser = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps)
    for step in range(steps):
        optimiser.zero_grad()
        value = loss()
        torch.autograd.backward(value)
        optimiser.step()
        schedule.step()
        tell(what, step + 1, steps, f"loss {float(value.detach()):.3g}")
