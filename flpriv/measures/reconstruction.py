"""Reconstruction: best assignment to originals, PSNR, SSIM and re-identification, each beside what no attack would reach.

Assignment is the only place where truth meets a claim; nothing an attack offers is chosen by looking at the originals.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flpriv.claim import Reconstruction
from flpriv.errors import ClaimError
from flpriv.finding import Finding, Metric, Pair
from flpriv.measures.images import all_correlations, all_mse, mse, psnr, ssim
from flpriv.measures.intervals import bootstrap_mean, clopper_pearson
from flpriv.records import Records
from flpriv.truth import Truth

RECOVERED_DB = 30.0
"""An original counts as recovered at this PSNR or above."""
ALIKE_SSIM = 0.9
"""An original counts as structurally recovered at this SSIM or above."""
LENIENT_MSE = 0.1
"""The published lenient rule, shown as such: most guesses meet it."""
GUESSES = 128
"""Public images the null may choose from, for each original."""
PAIRS = 16
"""Pairs shown over all sites; a quarter of it per site. Numbers are over all."""
FEW = 20
"""With fewer originals than this a caveat says so."""

Key = tuple[int, int | None]
"""Round and node; node ``None`` for a sum over clients."""


@dataclass(frozen=True, kw_only=True)
class Guesses:
    """What an adversary without the update offers: public images, or other patients' where there are none.

    Args:
        images: at most ``GUESSES``, drawn with a fixed seed.
        patients: whose they are; none is offered for his own image.
        mean: ``(C, *spatial)`` mean of all there are.
        source: ``"public images"`` or ``"other patients' images"``.
    """

    images: Tensor
    patients: tuple[str, ...]
    mean: Tensor
    source: str


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Originals behind the attacked updates, row by row, with what was assigned to each.

    Args:
        originals: ``(N, C, *spatial)``.
        best: the assigned reconstructions, zeros where there is none.
        guess: for each original the nearest of the public images.
        assigned: ``(N,)`` bool.
        psnr: ``(N,)``; an original without a reconstruction has that of a black image.
        ssim: ``(N,)``, likewise.
        guess_psnr: of ``guess``.
        guess_ssim: of ``guess``.
        mean_psnr: of the mean public image.
        rank: ``(N,)`` place of the true patient among all, 0 where there is no reconstruction.
        guess_rank: the same for ``guess``.
        lenient: ``(N,)`` bool: nearest original of some claim with MSE < .1.
        guess_lenient: ``(N,)`` bool: the same for as many public images as there are claims.
        site: one name per original.
        patient: one id per original.
    """

    originals: Tensor
    best: Tensor
    guess: Tensor
    assigned: Tensor
    psnr: Tensor
    ssim: Tensor
    guess_psnr: Tensor
    guess_ssim: Tensor
    mean_psnr: Tensor
    rank: Tensor
    guess_rank: Tensor
    lenient: Tensor
    guess_lenient: Tensor
    site: tuple[str, ...]
    patient: tuple[str, ...]

    def take(self, rows: Sequence[int]) -> Scored:
        """The originals at ``rows``."""
        index = list(rows)
        columns: dict[str, Any] = {}
        for field in fields(self):
            column = getattr(self, field.name)
            columns[field.name] = column[index] if isinstance(column, Tensor) else tuple(column[i] for i in index)
        return Scored(**columns)


def assign(claimed: Tensor, originals: Tensor) -> list[tuple[int, int]]:
    """(original, claim) pairs with the smallest total mean squared error, each used once; the longer side keeps leftovers."""
    from scipy.optimize import linear_sum_assignment

    rows, columns = linear_sum_assignment(all_mse(originals, claimed).numpy())
    return list(zip(rows.tolist(), columns.tolist(), strict=True))


def findings(claims: Sequence[Reconstruction], truth: Truth, new: Callable[..., Finding], *, seed: int) -> list[Finding]:
    """One finding over the records behind the attacked updates, then one per site.

    All claims about one (round, node) together are matched with the distinct records that node used; claims about a sum over
    clients (node ``None``) with all records of the round. An original without a reconstruction is a failure, and so is one whose
    node got a claim of no images; records behind updates the attack made no claim about are not counted, which a caveat says.
    Claims are clipped to [0, 1] and NaN is black.

    Raises:
        ClaimError: for images of another shape, or a claim about a round and node that trained on nothing.
    """
    grouped: dict[Key, list[Tensor]] = {}
    for claim in claims:
        grouped.setdefault((claim.round, claim.node), []).append(claim.images)
    guesses = _guesses(truth, seed=seed)
    scored = _concat([_score(key, images, truth, guesses) for key, images in sorted(grouped.items(), key=str)])
    claimed = sum(len(images) for group in grouped.values() for images in group)
    caveats = _coverage(grouped, truth, claimed=claimed, originals=len(scored.site))
    report = partial(_finding, patients=_count_patients(truth), guesses=guesses, new=new, seed=seed)
    found = [report(scored, site="", pairs=PAIRS, caveats=caveats)]
    for name in sorted(set(scored.site) - {""}):
        here = scored.take([row for row, site in enumerate(scored.site) if site == name])
        found.append(report(here, site=name, pairs=PAIRS // 4))
    return found


def _score(key: Key, images: Sequence[Tensor], truth: Truth, guesses: Guesses) -> Scored:
    originals = _originals(key, truth)
    shape = originals.images.shape[1:]
    for image in images:
        if image.shape[1:] != shape:
            raise ClaimError(
                f"reconstruction of round {key[0]}: images of shape {tuple(image.shape[1:])}, the originals are {tuple(shape)}"
            )
    claimed = torch.cat([image.detach().to("cpu", torch.float32) for image in images]).nan_to_num(0.0).clamp(0, 1)
    best, assigned = torch.zeros_like(originals.images), torch.zeros(len(originals), dtype=torch.bool)
    for row, column in assign(claimed, originals.images):
        best[row], assigned[row] = claimed[column], True
    guess = _nearest_guess(originals, guesses)
    return Scored(
        originals=originals.images,
        best=best,
        guess=guess,
        assigned=assigned,
        psnr=psnr(mse(best, originals.images)),
        ssim=ssim(best, originals.images),
        guess_psnr=psnr(mse(guess, originals.images)),
        guess_ssim=ssim(guess, originals.images),
        mean_psnr=psnr(mse(guesses.mean.expand_as(originals.images), originals.images)),
        rank=_ranks(best, originals, truth) * assigned,
        guess_rank=_ranks(guess, originals, truth),
        lenient=_lenient(claimed, originals.images),
        guess_lenient=_lenient(guesses.images[: len(claimed)], originals.images),
        site=_sites(key, originals, truth),
        patient=originals.patients or tuple(f"{key}/{i}" for i in range(len(originals))),
    )


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


def _guesses(truth: Truth, *, seed: int) -> Guesses:
    public = truth.public is not None and len(truth.public) > 0
    pool = truth.public if public else truth.everyone
    if pool is None or not len(pool):
        raise ClaimError("reconstructions cannot be judged without a null: set patients aside with sites.split.public")
    drawn = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))[:GUESSES]
    chosen = pool.take(drawn)
    return Guesses(
        images=chosen.images,
        patients=chosen.patients or ("",) * len(chosen),
        mean=pool.images.mean(0),
        source="public images" if public else "other patients' images",
    )


def _nearest_guess(originals: Records, guesses: Guesses) -> Tensor:
    """For each original the public image nearest to it: more than any adversary without the truth could choose."""
    distance = all_mse(originals.images, guesses.images)
    if originals.patients:
        own = torch.tensor([[mine == theirs for theirs in guesses.patients] for mine in originals.patients])
        distance = distance.masked_fill(own, float("inf"))
    return guesses.images[distance.argmin(1)]


def _lenient(claimed: Tensor, originals: Tensor) -> Tensor:
    hit = torch.zeros(len(originals), dtype=torch.bool)
    if len(claimed):
        nearest = all_mse(claimed, originals).min(1)
        hit[nearest.indices[nearest.values < LENIENT_MSE]] = True
    return hit


def _ranks(images: Tensor, originals: Records, truth: Truth) -> Tensor:
    """Place of the true patient when all are ordered by correlation with ``images``; ties count against the attack."""
    if truth.everyone is None or not originals.patients:
        return torch.zeros(len(images), dtype=torch.long)
    place = {patient: i for i, patient in enumerate(dict.fromkeys(truth.everyone.patients))}
    column = torch.tensor([place[patient] for patient in truth.everyone.patients])
    alike = all_correlations(images, truth.everyone.images)
    by_patient = torch.full((len(images), len(place)), -1.0, dtype=torch.float64)
    by_patient.scatter_reduce_(1, column.expand_as(alike), alike, "amax")
    own = by_patient.gather(1, torch.tensor([[place[patient]] for patient in originals.patients]))
    return (by_patient >= own).sum(1)


def _sites(key: Key, originals: Records, truth: Truth) -> tuple[str, ...]:
    named = originals.attributes.get("site")
    return named or (truth.site_of.get(key[1], "") if key[1] is not None else "",) * len(originals)


def _count_patients(truth: Truth) -> int:
    return len(set(truth.everyone.patients)) if truth.everyone is not None else 0


def _concat(parts: Sequence[Scored]) -> Scored:
    joined: dict[str, Any] = {}
    for field in fields(Scored):
        column = [getattr(part, field.name) for part in parts]
        joined[field.name] = torch.cat(column) if isinstance(column[0], Tensor) else tuple(itertools.chain(*column))
    return Scored(**joined)


def _finding(
    scored: Scored,
    *,
    site: str,
    pairs: int,
    patients: int,
    guesses: Guesses,
    new: Callable[..., Finding],
    seed: int,
    caveats: Sequence[str] = (),
) -> Finding:
    source = guesses.source
    best_guess = f"best of {len(guesses.images)} {source}"
    mean_image = "mean public image" if source == "public images" else "mean image"
    n = len(scored.site)

    def share(name: str, hits: Tensor, null: float, null_name: str, note: str = "") -> Metric:
        low, high = clopper_pearson(int(hits.sum()), n)
        return Metric(name=name, value=_mean(hits), low=low, high=high, n=n, null=null, null_name=null_name, note=note)

    def mean(name: str, values: Tensor, null: float, null_name: str, unit: str = "", note: str = "") -> Metric:
        low, high = bootstrap_mean(values.numpy(), scored.patient, seed=seed) or (None, None)
        return Metric(
            name=name, value=_mean(values), low=low, high=high, n=n, unit=unit, null=null, null_name=null_name, note=note
        )

    headline = share(
        f"fraction at PSNR ≥ {RECOVERED_DB:g} dB",
        scored.assigned & (scored.psnr >= RECOVERED_DB),
        _mean(scored.guess_psnr >= RECOVERED_DB),
        best_guess,
    )
    black = "originals without a reconstruction count as a black image"
    metrics = [
        headline,
        share(
            f"fraction at SSIM ≥ {ALIKE_SSIM:g}",
            scored.assigned & (scored.ssim >= ALIKE_SSIM),
            _mean(scored.guess_ssim >= ALIKE_SSIM),
            best_guess,
        ),
        mean("mean PSNR", scored.psnr, _mean(scored.guess_psnr), best_guess, "dB", black),
        mean("mean SSIM", scored.ssim, _mean(scored.guess_ssim), best_guess, note=black),
        mean("PSNR gained over the mean image", scored.psnr - scored.mean_psnr, 0.0, mean_image, "dB"),
        share(
            f"lenient rule, MSE < {LENIENT_MSE:g} to the nearest original",
            scored.lenient,
            _mean(scored.guess_lenient),
            f"as many {source} (at most {GUESSES})",
            "a published success rule that guesses meet; no measure of recovery",
        ),
    ]
    if patients:
        null = max(1 / patients, _mean(scored.guess_rank == 1))
        metrics.append(share(f"re-identification, own patient first of {patients}", scored.rank == 1, null, best_guess))
    return new(
        site=site,
        headline=headline,
        metrics=tuple(metrics),
        pairs=_pairs(scored, pairs),
        caveats=(*caveats, *_doubts(scored, n, best_guess)),
    )


def _doubts(scored: Scored, n: int, best_guess: str) -> list[str]:
    found = []
    if n < FEW:
        found.append(f"Only {n} originals: the intervals are wide.")
    if _mean(scored.psnr) <= _mean(scored.guess_psnr):
        found.append(f"On average the reconstructions are no nearer to the originals than the {best_guess}.")
    return found


def _coverage(attacked: Mapping[Key, object], truth: Truth, *, claimed: int, originals: int) -> list[str]:
    found = []
    rounds = {round for round, node in attacked if node is None}
    covered = [key for key in truth.used if key in attacked or key[0] in rounds]
    if len(covered) < len(truth.used):
        found.append(f"{len(covered)} of {len(truth.used)} updates were attacked; the records behind the others are not counted.")
    if claimed != originals:
        found.append(
            f"The attack offers {claimed} images for {originals} originals; they are matched with the originals at hand."
        )
    return found


def _pairs(scored: Scored, limit: int) -> tuple[Pair, ...]:
    quality = torch.where(scored.assigned, scored.psnr, -torch.inf)
    return tuple(
        Pair(
            original=_image(scored.originals[row]),
            reconstruction=_image(scored.best[row]),
            null=_image(scored.guess[row]),
            psnr=float(scored.psnr[row]),
            ssim=float(scored.ssim[row]),
            null_psnr=float(scored.guess_psnr[row]),
            null_ssim=float(scored.guess_ssim[row]),
            site=scored.site[row],
            rank=int(scored.rank[row]) or None,
        )
        for row in quality.argsort(descending=True, stable=True)[:limit].tolist()
    )


def _image(image: Tensor) -> NDArray[np.float32]:
    return np.array(image.numpy(), dtype=np.float32)


def _mean(values: Tensor) -> float:
    return float(values.double().mean())
