"""The columns of a mixture that ReLUs left half empty, found by sampling neurons that are off."""

from __future__ import annotations

import torch
from torch import Tensor

from flpriv.attacks.inversion.mixture import Mixture
from flpriv.progress import tell

_CHUNK = 1000
_SPARE = 2
"""Sampled neurons beyond those that fix a kernel: chance kernels do not pass them."""
_BLURRED = 4e-3
"""Kernels whose error may be larger are passed over. At a quarter of this hardly any kernel is found for two dozen images and a
learning rate of .01, where rounding to float32 weighs most."""
SPREAD = 1.0
"""How far aside of a point between the images neurons are sampled, in units of what neurons answer to it."""


def separate(mix: Mixture, *, rng: torch.Generator, samples: int, agreement: float, what: str) -> Tensor | None:
    """Q up to the scale of its columns, ``(B, B)``, for which most images agree with the ReLUs; ``None`` where none was found.

    An image that leaves neurons off sends them nothing, so enough neurons that are off for one image have that image's column of
    Q as their kernel. Sets of neurons are sampled among those that a point between the images leaves off. A kernel may be a
    column if each of its silent neurons is dispensable, and the likelier is one the better some point of the images' span turns
    off just these. The best kernels that do not mix each other are taken, until all images agree.

    Paper: after Dimitrov et al. 2024 (SPEAR), https://arxiv.org/abs/2403.03945.

    Args:
        mix: of at least two images.
        rng: draws the samples.
        samples: how many to draw at most.
        agreement: stop when every image agrees with the ReLUs as well as this, see :func:`agreement_of`.
        what: for progress.
    """
    frame = _frame(mix)
    pool, scores = torch.zeros((0, mix.images), dtype=torch.float64), torch.zeros(0, dtype=torch.float64)
    seen: set[bytes] = set()
    best, most, tried = None, -1, None
    for drawn in range(0, samples, _CHUNK):
        kernels, off = _sample(mix, frame, rng, seen)
        scores, order = torch.cat([scores, _separable(off, frame, steps=15)]).sort(descending=True, stable=True)
        pool, scores = torch.cat([pool, kernels])[order][: 20 * mix.images], scores[: 20 * mix.images]
        chosen = _foremost(pool @ mix.left.T, mix.images)
        tell(what, drawn, samples, f"{len(chosen)} of {mix.images} images")
        if len(chosen) < mix.images or (tried is not None and torch.equal(tried, pool[chosen])):
            continue
        tried = pool[chosen]
        settled, agreed = _settle(mix, tried.T)
        if int((agreed >= agreement).sum()) > most:
            best, most = settled, int((agreed >= agreement).sum())
        if most == mix.images:
            break
    return best


def agreement_of(sends: Tensor, on: Tensor) -> Tensor:
    """``(B,)`` how well the neurons that an image turns on, ``on`` ``(M, B)``, are those it sends something: the mean of the
    shares that agree among the neurons on and among those off.
    """
    silent = sends.abs() <= 1e-5 * sends.abs().amax(0)
    return (_share(silent, ~on) + _share(~silent, on)) / 2


def _sample(mix: Mixture, frame: Tensor, rng: torch.Generator, seen: set[bytes]) -> tuple[Tensor, Tensor]:
    """Kernels ``(N, B)`` from one chunk of samples and where they are silent ``(N, M)``, but those ``seen`` before."""
    rows, size = mix.left / mix.left.norm(dim=1, keepdim=True), mix.images - 1 + _SPARE
    off = _off_together(mix, frame, rng)
    if len(off) < size:
        return torch.zeros((0, mix.images)), torch.zeros((0, len(rows)), dtype=torch.bool)
    chosen = rows[off[torch.rand((_CHUNK, len(off)), generator=rng).topk(size).indices]]
    energy, basis = torch.linalg.eigh(chosen.mT @ chosen)
    error = 10 * float(mix.doubt.median()) * (size / energy[:, 1].clamp_min(1e-24)).sqrt()
    silent = (basis[:, :, 0] @ rows.T).abs() < error[:, None]
    silent = silent[(error < _BLURRED) & (energy[:, 0] < error.square()) & (silent.sum(1) >= size)]
    silent = silent[_new(silent, b"drawn", seen)]
    kernels, silent = _polished(mix, silent[_separable(silent, frame, steps=0) > 0.8])
    new = _new(silent, b"polished", seen)
    return kernels[new], silent[new]


def _off_together(mix: Mixture, frame: Tensor, rng: torch.Generator) -> Tensor:
    """Neurons that are off at a point between the images, a mean over a few neurons, or somewhat aside: so for images near it."""
    some = torch.randint(len(mix.left), (int(torch.randint(1, 9, (1,), generator=rng)),), generator=rng)
    sums = mix.left[some] @ mix.ones
    answers = mix.weight @ (sums @ mix.left[some] / sums.square().sum()) + mix.bias
    aside = frame @ torch.randn(mix.images, generator=rng, dtype=torch.float64) / mix.images**0.5
    reach = SPREAD * float(torch.rand((), generator=rng)) * float(answers.norm()) / len(answers) ** 0.5
    off: Tensor = (answers + reach * aside < 0).nonzero().flatten()
    return off


def _new(silent: Tensor, kind: bytes, seen: set[bytes]) -> list[int]:
    """The rows that ``seen`` does not hold yet; it does afterwards."""
    keys = [kind + row.tobytes() for row in silent.numpy()]
    first = {key: place for place, key in reversed(list(enumerate(keys))) if key not in seen}
    seen.update(first)
    return sorted(first.values())


def _polished(mix: Mixture, silent: Tensor) -> tuple[Tensor, Tensor]:
    """The kernels that most of the ``silent`` neurons share and where they are silent, but those that hang on a single neuron."""
    squares = (mix.left[:, :, None] * mix.left[:, None, :]).flatten(1)
    rounding = 8 * mix.noise + 1e-6 * mix.left.norm(dim=1)
    weights = silent.double()
    for _ in range(5):
        energy, basis = torch.linalg.eigh((weights @ squares).view(-1, mix.images, mix.images))
        off = basis[:, :, 0] @ mix.left.T / rounding
        weights = silent / (1 + off.square())
    silent = off.abs() < 2
    energy, basis = torch.linalg.eigh((silent.double() @ squares).view(-1, mix.images, mix.images))
    others = basis[:, :, 1:] / energy[:, None, 1:].clamp_min(torch.finfo(torch.float64).tiny).sqrt()
    weighs = ((others @ others.mT).flatten(1) @ squares.T).masked_fill(~silent, 0.0)
    firm = (weighs.amax(1) < 0.999) & (silent.sum(1) > mix.images)
    return basis[:, :, 0][firm], silent[firm]


def _foremost(sends: Tensor, most: int) -> list[int]:
    """The first rows of ``sends`` ``(N, M)`` that are no mixtures of rows taken before, at most so many."""
    rest = sends / sends.norm(dim=1, keepdim=True)
    taken: list[int] = []
    while len(taken) < most and bool((left := rest.norm(dim=1) > 1e-2).any()):
        taken.append(int(left.byte().argmax()))
        unit = rest[taken[-1]] / rest[taken[-1]].norm()
        rest = rest - torch.outer(rest @ unit, unit)
    return taken


def _frame(mix: Mixture) -> Tensor:
    """``(M, B)``: what the neurons answer to points of the images' affine span, in orthonormal coordinates times √M."""
    middle = mix.ones / mix.ones.square().sum()
    along = torch.linalg.svd(mix.ones[None])[2][1:].T
    answers = torch.cat([mix.weight @ along, (mix.weight @ middle + mix.bias)[:, None]], 1)
    frame: Tensor = torch.linalg.qr(answers)[0] * len(answers) ** 0.5
    return frame


def _separable(off: Tensor, frame: Tensor, *, steps: int) -> Tensor:
    """``(N,)`` how well one point of the span can turn off just the neurons ``off`` ``(N, M)``; 1 for what an image does.

    The mean share of hits among neurons on and off, by logistic regression; ``steps`` = 0 for the linear one it starts from.
    """
    sign = torch.where(off, -1.0, 1.0).double()
    kinds = off.sum(1).clamp_min(1), (~off).sum(1).clamp_min(1)
    point = sign @ frame / len(frame)
    ridge = 1e-6 * len(frame) * torch.eye(frame.shape[1], dtype=torch.float64)
    best = torch.zeros(len(off), dtype=torch.float64)
    for step in range(steps + 1):
        answers = point @ frame.T
        hits = ((answers < 0) & off).sum(1) / kinds[0] + ((answers >= 0) & ~off).sum(1) / kinds[1]
        best = torch.maximum(best, hits.double() / 2)
        if step < steps:
            wrong = torch.sigmoid(-sign * answers)
            curve = (frame.T * (wrong * (1 - wrong))[:, None]) @ frame
            point = point + torch.linalg.solve(curve + ridge, (sign * wrong) @ frame)
    return best


def _share(hits: Tensor, among: Tensor) -> Tensor:
    return (hits & among).sum(0) / among.sum(0).clamp_min(1)


def _settle(mix: Mixture, kernels: Tensor) -> tuple[Tensor, Tensor]:
    """Kernels of the neurons that each image leaves off, and how far these agree with what it sends."""
    _, sends, on = mix.read(kernels)
    better, _ = _polished(mix, ~on.T)
    if len(better) == mix.images:
        kernels = better.T
        _, sends, on = mix.read(kernels)
    return kernels, agreement_of(sends, on)
