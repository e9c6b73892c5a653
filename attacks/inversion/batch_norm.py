"""Batch statistics: what batch normalisation says of the images it has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import torch
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm

from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.received import Batch, received
from flpriv.attacks.inversion.unroll import Replay
from flpriv.state import State

Statistics = Sequence[Tensor]
"""For each layer of batch normalisation a mean ``(C,)`` and an unbiased variance ``(C,)``, then one number a layer that says how
much it counts, 0 where nothing is known."""


def layers(site: Replay, state: State) -> dict[str, _BatchNorm]:
    """The layers of batch normalisation that gather statistics in ``state``, in the model's order."""
    found = {name: module for name, module in site.model.named_modules() if isinstance(module, _BatchNorm)}
    return {name: module for name, module in found.items() if f"{name}.running_mean" in state}


def gathered(evidence: Evidence, labels: Tensor) -> list[Tensor]:
    """The running :data:`Statistics` of the model sent, freed of the initial ones; layers that have gathered none count 0.

    After few batches running statistics are still close to the 0 and 1 they began with. ``labels`` do not matter.
    """
    sent = evidence.seen.sent
    known, counts = [], []
    for name, layer in layers(evidence.site, sent).items():
        mean, var = sent[f"{name}.running_mean"], sent[f"{name}.running_var"]
        kept = (1 - layer.momentum) ** _tracked(sent, name) if layer.momentum is not None else 0.0
        counts.append(bool(mean.any()) or bool((var != 1).any()))
        early = kept < 1 and bool((var > kept).all())
        known.append((mean / (1 - kept), (var - kept) / (1 - kept)) if early else (mean, var))
    return _told(known, counts, labels)


def left(evidence: Evidence, labels: Tensor) -> list[Tensor]:
    """The :data:`Statistics` of the site's own batches, from how its training moved the running ones.

    Each step leaves ``running ← (1 - m) running + m batch``. Over several steps this is solved for the weighted mean over
    batches that :func:`moments` gives. Layers whose statistics came back as they were sent count 0. ``labels`` do not matter.
    """
    sent, returned, site = evidence.seen.sent, evidence.seen.returned, evidence.site
    known, counts = [], []
    for name, layer in layers(site, sent).items():
        kept = prod(1 - share for share in _shares(layer, site, seen=_tracked(sent, name)))
        pairs = [(sent[f"{name}.{what}"], returned[f"{name}.{what}"]) for what in ("running_mean", "running_var")]
        counts.append(any(not torch.equal(before, after) for before, after in pairs))
        mean, var = ((after - kept * before) / max(1 - kept, 1e-12) for before, after in pairs)
        known.append((mean, var))
    return _told(known, counts, labels)


def moments(site: Replay, state: State) -> Callable[[Tensor], list[Tensor]]:
    """From images ``(N, C, *spatial)`` to mean and unbiased variance of what each layer receives, the mean over local steps.

    Later steps weigh more where the running statistics do so. Steps are taken at the weights sent.
    """
    chosen = layers(site, state)
    weights = [_of_batches(layer, site) for layer in chosen.values()]

    def measure(images: Tensor) -> list[Tensor]:
        seen = received(site, images, list(chosen))
        means: list[Tensor] = []
        for place, weight in enumerate(weights):
            parts = [[weight[batch] * one for one in _mean_and_var(inputs[place])] for batch, inputs in seen.items()]
            means.extend(torch.stack(part).sum(0) for part in zip(*parts, strict=True))
        return means

    return measure


def apart(site: Replay, state: State, *, first: float = 1.0) -> Callable[[Tensor, Statistics], Tensor]:
    """A penalty: ``Σ |mean - known mean| + |var - known var|`` over layers, Euclidean norms over channels.

    Args:
        site: replays the round.
        state: the model sent.
        first: weight of the first layer, which sees the images best.
    """
    measure = moments(site, state)

    def penalty(images: Tensor, known: Statistics) -> Tensor:
        *statistics, counts = known
        gaps = [torch.linalg.vector_norm(own - told) for own, told in zip(measure(images), statistics, strict=True)]
        sums = torch.stack(gaps).view(-1, 2).sum(1)
        scale = torch.ones_like(sums)
        scale[0] = first
        return (scale * counts * sums).sum()

    return penalty


def _told(known: Sequence[tuple[Tensor, Tensor]], counts: Sequence[bool], like: Tensor) -> list[Tensor]:
    flat = [one.to(like.device) for pair in known for one in pair]
    return [*flat, torch.tensor([float(count) for count in counts], device=like.device)]


def _tracked(state: State, name: str) -> int:
    count = state.get(f"{name}.num_batches_tracked")
    return 0 if count is None else int(count)


def _shares(layer: _BatchNorm, site: Replay, *, seen: int = 0) -> list[float]:
    """How far each local step moves the running statistics of ``layer`` towards those of its batch."""
    if layer.momentum is None:
        return [1 / (seen + step + 1) for step in range(len(site.batches))]
    return [layer.momentum] * len(site.batches)


def _of_batches(layer: _BatchNorm, site: Replay) -> dict[Batch, float]:
    """What each batch weighs in the running statistics after the round, 1 together."""
    shares = _shares(layer, site)
    weights = [share * prod(1 - later for later in shares[step + 1 :]) for step, share in enumerate(shares)]
    total: dict[Batch, float] = {}
    for batch, weight in zip(site.batches, weights, strict=True):
        total[batch] = total.get(batch, 0.0) + weight / sum(weights)
    return total


def _mean_and_var(inputs: Tensor) -> tuple[Tensor, Tensor]:
    """``(C,)`` each, the variance unbiased as in running statistics; 0 where a channel holds a single value."""
    flat = inputs.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, correction=min(1, flat.shape[1] - 1))
