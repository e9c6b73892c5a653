"""Reconstruction: claims matched with originals, in numbers, pairs and doubts, over the federation and site by site."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flpriv.claim import Reconstruction
from flpriv.finding import Finding, Pair
from flpriv.measures import updates
from flpriv.measures.guesses import Guesses, draw
from flpriv.measures.images import rdlv
from flpriv.measures.recovery import Recovery
from flpriv.measures.scoring import Key, Scored, score
from flpriv.truth import Truth

PAIRS = 16
"""Pairs shown over all sites; a quarter of it per site. Numbers are over all."""
FEW = 20
"""With fewer patients than this a caveat says so."""


def findings(claims: Sequence[Reconstruction], truth: Truth, new: Callable[..., Finding], *, seed: int) -> list[Finding]:
    """One finding over the records behind the attacked updates, then one per site.

    All claims about one (round, node) together are matched with the distinct records that node used; claims about a sum over
    clients (node ``None``) with all records of the round. An original without a reconstruction is a failure, and so is one whose
    node got a claim of no images; records behind updates the attack made no claim about are not counted, which a caveat says.
    Claims are clipped to [0, 1] and NaN is black.

    Raises:
        ClaimError: for images of another shape, or a claim about a round and node that trained on nothing.
    """
    guesses = draw(truth, seed=seed)
    attacked = updates.updates(claims)
    images = {(update.round, update.node): [claim.images for claim in update.claims] for update in attacked}
    scored = score(images, truth, guesses)
    patients = len(set(truth.everyone.patients)) if truth.everyone is not None else 0

    def finding(here: Scored, behind: Sequence[updates.Update], *, site: str, pairs: int, caveats: Sequence[str] = ()) -> Finding:
        numbers = Recovery(scored=here, guesses=guesses, patients=patients, seed=seed).metrics()
        return new(
            site=site,
            headline=numbers[0],
            metrics=(*numbers, *updates.metrics(behind, seed=seed)),
            pairs=_pairs(here, pairs),
            caveats=(*caveats, *_doubts(here, guesses)),
        )

    caveats = [*_coverage(images, truth, claimed=sum(len(claim.images) for claim in claims), originals=len(scored))]
    found = [finding(scored, attacked, site="", pairs=PAIRS, caveats=(*caveats, *updates.caveats(attacked)))]
    for name in sorted(set(scored.matched.site) - {""}):
        rows = [row for row, site in enumerate(scored.matched.site) if site == name]
        behind = [update for update in attacked if update.node is not None and truth.site_of.get(update.node) == name]
        found.append(finding(scored.take(rows), behind, site=name, pairs=PAIRS // 4))
    return found


def _doubts(scored: Scored, guesses: Guesses) -> list[str]:
    found = []
    n, patients = len(scored), len(set(scored.matched.patient))
    if patients < FEW:
        of = f" of {patients} patient{'s' if patients > 1 else ''}" if patients < n else ""
        found.append(f"Only {n} original{'s' if n > 1 else ''}{of}: the intervals are wide.")
    nulls = {guesses.best_name: scored.guessed, guesses.mean_name: scored.average}
    if missed := [name for name, null in nulls.items() if scored.found.psnr.mean() <= null.psnr.mean()]:
        found.append(f"On average the reconstructions are no nearer to the originals than the {' or the '.join(missed)}.")
    return found


def _coverage(attacked: Collection[Key], truth: Truth, *, claimed: int, originals: int) -> list[str]:
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
    matched, found, guessed = scored.matched, scored.found, scored.guessed
    leaked = rdlv(found.ssim, scored.average.ssim)
    quality = torch.where(matched.assigned, found.psnr, -torch.inf)
    return tuple(
        Pair(
            original=_image(matched.originals[row]),
            reconstruction=_image(matched.best[row]),
            null=_image(scored.guess[row]),
            psnr=float(found.psnr[row]),
            ssim=float(found.ssim[row]),
            null_psnr=float(guessed.psnr[row]),
            null_ssim=float(guessed.ssim[row]),
            site=matched.site[row],
            rank=int(scored.rank[row]) or None,
            rdlv=float(leaked[row]) if leaked[row].isfinite() else None,
        )
        for row in quality.argsort(descending=True, stable=True)[:limit].tolist()
    )


def _image(image: Tensor) -> NDArray[np.float32]:
    return np.array(image.numpy(), dtype=np.float32)
