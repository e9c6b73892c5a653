"""What a compression leaves of an update, and how a trial is compared through it.

A compressed update does not say what the update was, only where it lies: below a threshold, within half a step, on one side of
zero. Compared as it stands, it calls the truth itself wrong. Here the trial is moved first: every difference that the compression
may have made is forgiven, and what is left contradicts the update. In this order:

- :func:`clipped` (Gaussian, Laplace): the trial is clipped as the update was;
- :func:`sparse` (top-k): of an entry that was not sent, only what exceeds the smallest one sent counts. QSGD after top-k sends
  zeros of its own, which say more than they hide: then all entries are compared;
- :func:`rounded` (uniform quantiser): only what is further away than half a step counts;
- :func:`signs` (signSGD): entries become their signs, smoothly.

Noise without a bias (QSGD's rounding, Gaussian and Laplace noise) is left to the objective, which averages it out. The objective
then counts by the share of the update that is signal, so that what is known of images counts the more.

Paper: after Yue et al. 2023, Gradient Obfuscation Gives a False Sense of Security, https://arxiv.org/abs/2206.04055.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import hypot
from typing import Any

import torch
from torch import Tensor

from flpriv.attacks.inversion.objective import Objective
from flpriv.errors import FlprivError

Channel = Callable[[Sequence[Tensor]], list[Tensor]]
"""A trial to the trial with every difference from the observed update forgiven that a compression may have made."""

_TIGHT = 3.0
"""How much more a difference counts that no rounding explains."""
_SIGN, _LARGE = (0.03, 0.1), (0.2, 0.4)
"""Over how much of a tensor's mean magnitude a sign changes, from zero to right and from zero to wrong; so too for signs of large
entries alone, which the true update does not have near zero."""


def through(
    target: Sequence[Tensor], *, defenses: Sequence[tuple[str, Mapping[str, Any]]] | None, base: Objective, lr: float
) -> Callable[[Sequence[Tensor]], Tensor]:
    """``base`` as a function of the trial alone, looking through the sites' defences.

    Works under ``torch.func``, whether ``target`` is mapped over or not. What is made of ``target`` is made at once: keep the
    function while the target stays the same.

    Args:
        target: the observed update in units of the gradient, ``(W₀ - W_τ) / lr``, a tensor per parameter.
        defenses: (name, options) as in :class:`flpriv.capture.Observation`, or as :func:`recognise` finds them. Those that do not
            touch the update, or are not known here, are passed over; ``None`` is as ``()``.
        base: compares an update with the observed one.
        lr: the sites' learning rate, > 0, which brings options in units of the update into units of the gradient.

    Raises:
        FlprivError: if a defence comes without an option that says how strong it is.
    """
    clips: list[Channel] = []
    masks: list[Channel] = []
    grids: list[Channel] = []
    noise, blur = target[0].new_zeros(()), 0.0
    names = [name for name, _ in defenses or ()]
    for name, options in reversed(defenses or ()):
        before, after = names[: names.index(name)], names[names.index(name) + 1 :]
        if name in ("gaussian", "laplace"):
            limit = _option(name, options, "max_grad_norm") / lr
            clips.append(clipped(limit=limit))
            if multiplier := _option(name, options, "noise_multiplier"):
                noise = noise + sum((o != 0).sum() for o in target) * (multiplier * limit) ** 2
                blur = hypot(blur, 4 * multiplier * limit)
        elif name == "top-k" and "qsgd" not in after:
            masks.append(sparse(target, blur=blur, signed="sign-sgd" in after))
        elif name == "sign-sgd":
            grids.append(signs(target, blur=blur, large="top-k" in before))
        elif name == "uniform-quantiser":
            grids.append(rounded(target, bits=int(_option(name, options, "bits"))))
        elif name == "qsgd":
            noise = noise + rounding_noise(target, levels=int(_option(name, options, "levels")))
    energy = torch.stack([o.square().sum() for o in target]).sum()
    signal = (1 - noise / energy.clamp_min(torch.finfo(energy.dtype).tiny)).clamp(0.02, 1.0)

    def compare(trial: Sequence[Tensor]) -> Tensor:
        for channel in (*clips, *masks, *grids):
            trial = channel(trial)
        return signal * base(trial, target)

    return compare


def sparse(observed: Sequence[Tensor], *, blur: float = 0.0, signed: bool = False) -> Channel:
    """Entries that were not sent are free up to the smallest magnitude sent in their tensor; beyond it they are compared with 0.

    Args:
        observed: the update.
        blur: magnitudes up to this one count as not sent; for noise that was added after.
        signed: only signs were sent of the rest: then its mean magnitude takes the place of the smallest.
    """
    least = _mean if signed else _smallest
    free = [torch.where(o.abs() > blur, 0.0, least(o, blur)) for o in observed]
    # Where an entry is forgiven, trial and observed update are both 0, and so is any objective's slope: the clamp needs none.
    return lambda trial: [t - t.detach().clamp(-f, f) for t, f in zip(trial, free, strict=True)]


def rounded(observed: Sequence[Tensor], *, bits: int) -> Channel:
    """Entries are free within half a step of where they were rounded to; ``bits`` as of ``uniform-quantiser`` say the step."""
    halves = [o.abs().amax() / (2 ** (bits - 1) - 1) / 2 for o in observed]

    def beyond(t: Tensor, o: Tensor, half: Tensor) -> Tensor:
        apart = t - o
        return torch.add(o, apart - apart.clamp(-half, half), alpha=_TIGHT)

    return lambda trial: [beyond(t, o, half) for t, o, half in zip(trial, observed, halves, strict=True)]


def signs(observed: Sequence[Tensor], *, blur: float = 0.0, large: bool = False) -> Channel:
    """Entries become their signs, smoothly, times the magnitude sent.

    The smooth sign is steep on the side that is right, where small entries of the true update shall count as right as large ones
    do, and flatter on the side that is wrong, so that the search sees from further off where to go.

    Args:
        observed: the update.
        blur: magnitudes up to this one count as 0; for noise that was added after.
        large: only large entries were sent at all.
    """
    right, wrong = _LARGE if large else _SIGN
    sent = [o * (o.abs() > blur) for o in observed]
    sizes = [s.abs().sum() / (s != 0).sum().clamp_min(1) for s in sent]
    means = [_mean(o, blur).clamp_min(1e-12) for o in observed]

    def sign(t: Tensor, s: Tensor, size: Tensor, mean: Tensor) -> Tensor:
        slope = torch.where(t.detach() * s > 0, 1 / (right * mean), 1 / (wrong * mean))
        return size * torch.tanh(slope * t)

    return lambda trial: [sign(*parts) for parts in zip(trial, sent, sizes, means, strict=True)]


def clipped(*, limit: float) -> Channel:
    """All tensors together scaled to a Euclidean norm of at most ``limit``."""

    def clip(trial: Sequence[Tensor]) -> list[Tensor]:
        length = torch.stack([t.square().sum() for t in trial]).sum().clamp_min(1e-30).sqrt()
        factor = (limit / length).clamp_max(1.0)
        return [factor * t for t in trial]

    return clip


def rounding_noise(observed: Sequence[Tensor], *, levels: int) -> Tensor:
    """The expected squared norm of what ``qsgd`` added, scalar: an entry that was at part f of a step s has variance s²f(1 - f).

    Where in its step an entry was is not known. Above the first step it is taken to be anywhere, s²/6. Below it small entries are
    the more frequent: 2s²/3 for each that was rounded up, between s²/3 for a flat density and s² for a steep one.
    """
    total = observed[0].new_zeros(())
    for o in observed:
        step = (o.abs().amax() / (levels - 1)).clamp_min(torch.finfo(o.dtype).tiny)
        level = (o.abs() / step).round()
        total = total + step.square() * ((level == 1).sum() * (2 / 3) + (level > 1).sum() / 6)
    return total


def recognise(observed: Sequence[Tensor]) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    """The defences that an update speaks of by itself, for an adversary who is not told: signSGD, top-k, or ``()``.

    In a tensor that signSGD sent all magnitudes but 0 are equal, and there are not few of them. After top-k the smallest
    magnitude in the largest tensor is far above what so many entries would reach by chance. A grid shows too, but not whether
    entries were rounded to it at random, so nothing is said of it.

    Args:
        observed: the update in any unit, a tensor per parameter; not to be called under ``torch.func``.
    """
    sizes = [o.abs()[o != 0] for o in observed]
    found = [size for size in sizes if len(size)]
    share = sum(map(len, sizes)) / max(1, sum(o.numel() for o in observed))
    if not found:
        return ()
    if share >= 0.25 and all(bool(size.max() < 1.02 * size.min()) for size in found):
        return (("sign-sgd", {}),)
    largest = max(found, key=len)
    steps = largest / largest.min()
    grid = bool(((steps - steps.round()).abs() < 0.02).all())
    cut = float(largest.min() * len(largest) / largest.mean()) > 20
    return (("top-k", {}),) if share < 1 and cut and not grid else ()


def _smallest(observed: Tensor, above: float) -> Tensor:
    """The smallest magnitude beyond ``above``, 0 where there is none."""
    size = observed.abs()
    least = torch.where(size > above, size, torch.inf).amin()
    return torch.where(least.isinf(), 0.0, least)


def _mean(observed: Tensor, above: float) -> Tensor:
    """The mean magnitude, before ``sign-sgd``, of the entries whose signs were sent: it sends the mean over all entries."""
    sent = observed.abs() > above
    return (observed.abs() * sent).sum() * observed.numel() / sent.sum().clamp_min(1).square()


def _option(name: str, options: Mapping[str, Any], key: str) -> float:
    if key not in options:
        raise FlprivError(f"the capture names the defence {name!r} without its {key!r}; capture all of a defence's options")
    return float(options[key])
