"""Reconstructions meet originals: best assignment, then how alike each pair is. Nowhere else does truth meet a claim."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from flpriv.errors import ClaimError
from flpriv.measures.guesses import Guesses
from flpriv.measures.images import all_correlations, all_mse, ms_ssim, mse, psnr, ssim
from flpriv.records import Records
from flpriv.truth import Truth

LENIENT_MSE = 0.1
"""The published lenient rule, shown as such: most guesses meet it."""

Key = tuple[int, int | None]
"""Round and node; node ``None`` for a sum over clients."""


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How alike the offered images are to the originals.

    Args:
        psnr: ``(N,)`` dB, at most :data:`~flpriv.measures.images.CEILING`.
        ssim: ``(N,)``.
        ms_ssim: ``(N,)``, NaN where the images are too small.
    """

    psnr: Tensor
    ssim: Tensor
    ms_ssim: Tensor

    @staticmethod
    def of(offered: Tensor, originals: Tensor) -> Quality:
        """Of ``(N, C, *spatial)`` images, row by row."""
        return Quality(psnr=psnr(mse(offered, originals)), ssim=ssim(offered, originals), ms_ssim=ms_ssim(offered, originals))


@dataclass(frozen=True, kw_only=True)
class Matched:
    """Originals behind attacked updates, row by row, with what was assigned to each.

    Args:
        originals: ``(N, C, *spatial)``.
        best: the assigned reconstructions, black where there is none.
        assigned: ``(N,)`` bool.
        lenient: ``(N,)`` bool: nearest original of some claim with MSE < .1.
        guess_lenient: ``(N,)`` bool: the same for as many public images as there are claims.
        site: one name per original.
        patient: one id per original.
    """

    originals: Tensor
    best: Tensor
    assigned: Tensor
    lenient: Tensor
    guess_lenient: Tensor
    site: tuple[str, ...]
    patient: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Matched originals with scores; an original without a reconstruction has those of a black image.

    Args:
        matched: the N originals.
        guess: for each the nearest of the public images.
        found: of the reconstructions.
        guessed: of ``guess``.
        average: of the mean public image.
        rank: ``(N,)`` place of the true patient among all by similarity, 0 where there is no reconstruction.
        guess_rank: the same for ``guess``.
    """

    matched: Matched
    guess: Tensor
    found: Quality
    guessed: Quality
    average: Quality
    rank: Tensor
    guess_rank: Tensor

    def __len__(self) -> int:
        return len(self.matched.site)

    def take(self, rows: Sequence[int]) -> Scored:
        """The originals at ``rows``."""
        taken: Scored = _rows(self, list(rows))
        return taken


def score(claims: Mapping[Key, Sequence[Tensor]], truth: Truth, guesses: Guesses) -> Scored:
    """Match what was claimed about each update with the records behind it, and score all of them.

    Raises:
        ClaimError: for images of another shape, or a claim about a round and node that trained on nothing.
    """
    matched = _concat([_match(key, images, truth, guesses) for key, images in sorted(claims.items(), key=str)])
    originals, patients = matched.originals, matched.patient
    guess = guesses.nearest(originals, patients)
    ranks = _ranks(torch.cat([matched.best, guess]), patients * 2, truth)
    return Scored(
        matched=matched,
        guess=guess,
        found=Quality.of(matched.best, originals),
        guessed=Quality.of(guess, originals),
        average=Quality.of(guesses.mean(patients), originals),
        rank=ranks[: len(patients)] * matched.assigned,
        guess_rank=ranks[len(patients) :],
    )


def assign(claimed: Tensor, originals: Tensor) -> list[tuple[int, int]]:
    """(original, claim) pairs with the largest total PSNR, each used once; the longer side keeps leftovers.

    Not the smallest total mean squared error: that gives exact reconstructions away to other originals where poor claims gain
    by it, and recovered images would be counted as lost.
    """
    return _best(all_mse(originals, claimed))


def _match(key: Key, images: Sequence[Tensor], truth: Truth, guesses: Guesses) -> Matched:
    originals = _originals(key, truth)
    shape = originals.images.shape[1:]
    for image in images:
        if image.shape[1:] != shape:
            raise ClaimError(
                f"reconstruction of round {key[0]}: images of shape {tuple(image.shape[1:])}, the originals are {tuple(shape)}"
            )
    claimed = torch.cat([image.detach().to("cpu", torch.float32) for image in images]).nan_to_num(0.0).clamp(0, 1)
    distance = all_mse(originals.images, claimed)
    best, assigned = torch.zeros_like(originals.images), torch.zeros(len(originals), dtype=torch.bool)
    for row, column in _best(distance):
        best[row], assigned[row] = claimed[column], True
    return Matched(
        originals=originals.images,
        best=best,
        assigned=assigned,
        lenient=_lenient(distance),
        guess_lenient=_lenient(all_mse(originals.images, guesses.drawn.images[: len(claimed)])),
        site=_sites(key, originals, truth),
        patient=originals.patients or tuple(f"{key}/{i}" for i in range(len(originals))),
    )


def _best(squared: Tensor) -> list[tuple[int, int]]:
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(psnr(squared).numpy(), maximize=True)
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def _lenient(distance: Tensor) -> Tensor:
    hit = torch.zeros(len(distance), dtype=torch.bool)
    if distance.numel():
        nearest = distance.min(0)
        hit[nearest.indices[nearest.values < LENIENT_MSE]] = True
    return hit


def _originals(key: Key, truth: Truth) -> Records:
    round, node = key
    if node is not None:
        if (round, node) not in truth.used:
            raise ClaimError(f"reconstruction of round {round}, node {node}: that node trained on nothing in that round")
        return truth.used[round, node]
    parts = [records for (when, _), records in sorted(truth.used.items()) if when == round]
    if not parts:
        raise ClaimError(f"reconstruction of round {round}: no node trained in that round")
    together = Records.concat(parts)
    distinct = {id: row for row, id in reversed(list(enumerate(together.ids)))}
    return together.take(sorted(distinct.values())) if together.ids else together


def _ranks(images: Tensor, patients: Sequence[str], truth: Truth) -> Tensor:
    """Place of the true patient when all are ordered by correlation with ``images``; ties count against the attack."""
    if truth.everyone is None or not truth.everyone.patients:
        return torch.zeros(len(images), dtype=torch.long)
    place = {patient: i for i, patient in enumerate(dict.fromkeys(truth.everyone.patients))}
    column = torch.tensor([place[patient] for patient in truth.everyone.patients])
    alike = all_correlations(images, truth.everyone.images)
    by_patient = torch.full((len(images), len(place)), -1.0, dtype=torch.float64)
    by_patient.scatter_reduce_(1, column.expand_as(alike), alike, "amax")
    own = by_patient.gather(1, torch.tensor([[place.get(patient, 0)] for patient in patients]))
    return (by_patient >= own).sum(1) * torch.tensor([patient in place for patient in patients])


def _sites(key: Key, originals: Records, truth: Truth) -> tuple[str, ...]:
    named = originals.attributes.get("site")
    return named or (truth.site_of.get(key[1], "") if key[1] is not None else "",) * len(originals)


def _concat(parts: Sequence[Matched]) -> Matched:
    joined: dict[str, Any] = {}
    for field in fields(Matched):
        column = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(column) if isinstance(column[0], Tensor) else tuple(itertools.chain(*column))
    return Matched(**joined)


def _rows(value: Any, index: list[int]) -> Any:
    if isinstance(value, Tensor):
        return value[index]
    if isinstance(value, tuple):
        return tuple(value[row] for row in index)
    return type(value)(**{field.name: _rows(getattr(value, field.name), index) for field in fields(value)})
