"""How near reconstructions come to their originals: each number with its interval over patients, beside two nulls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from torch import Tensor

from flpriv.finding import Metric
from flpriv.measures.guesses import MOST, Guesses
from flpriv.measures.images import CEILING, LEAST_PRIOR, WEIGHTS, rdlv, scales
from flpriv.measures.intervals import bootstrap
from flpriv.measures.scoring import LENIENT_MSE, Quality, Scored
from flpriv.measures.shares import share_interval

RECOVERED_DB = 30.0
"""An original counts as recovered at this PSNR or above."""
ALIKE_SSIM = 0.9
"""An original counts as structurally recovered at this SSIM or above."""
BLACK = "an original without a reconstruction counts as a black image"
CAPPED = f"{BLACK}; above {CEILING:g} dB counts as {CEILING:g} dB"


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """The metrics of some originals.

    Args:
        scored: the originals.
        guesses: where the nulls came from.
        patients: how many there are in the federation, 0 where they are not known.
        seed: of the bootstrap.
    """

    scored: Scored
    guesses: Guesses
    patients: int
    seed: int

    def metrics(self) -> tuple[Metric, ...]:
        """All of them; the first is the headline."""
        average = self.scored.average
        return (
            self._reached(f"fraction at PSNR ≥ {RECOVERED_DB:g} dB", lambda q: q.psnr >= RECOVERED_DB),
            self._reached(f"fraction at SSIM ≥ {ALIKE_SSIM:g}", lambda q: q.ssim >= ALIKE_SSIM),
            self._over("mean PSNR", lambda q: q.psnr, unit="dB", note=CAPPED),
            self._over("median PSNR", lambda q: q.psnr, np.median, unit="dB"),
            self._over("PSNR gained over the mean image", lambda q: q.psnr - average.psnr, unit="dB"),
            self._over("mean SSIM", lambda q: q.ssim, note=BLACK),
            self._multiscale(),
            self._leaked(),
            self._lenient(),
            *([self._identified()] if self.patients else []),
        )

    def _reached(self, name: str, met: Callable[[Quality], Tensor]) -> Metric:
        scored = self.scored
        share = self._share(name, scored.matched.assigned & met(scored.found))
        return replace(share, **self._nulls(lambda quality: met(quality).double()))

    def _multiscale(self) -> Metric:
        size = self.scored.matched.originals.shape[2:]
        held = scales(size)
        if held < 2:
            return Metric(name="mean MS-SSIM", value=None, note=f"images of {min(size)} pixels hold no two scales")
        name = "mean MS-SSIM" if held == len(WEIGHTS) else f"mean MS-SSIM, {held} of {len(WEIGHTS)} scales"
        return self._over(name, lambda q: q.ms_ssim, note=BLACK)

    def _leaked(self) -> Metric:
        """RDLV with the mean public image as the prior: what an adversary knows of a patient before any update."""
        prior = self.scored.average.ssim
        metric = self._over(f"mean RDLV over the {self.guesses.mean_name}", lambda q: rdlv(q.ssim, prior))
        left_out = len(prior) - metric.n
        why = f"{left_out} of {len(prior)} originals left out: their SSIM with the prior is below {LEAST_PRIOR:g}"
        return replace(metric, note=why if left_out else "")

    def _lenient(self) -> Metric:
        matched = self.scored.matched
        return replace(
            self._share(f"lenient rule, MSE < {LENIENT_MSE:g} to the nearest original", matched.lenient),
            null=_mean(matched.guess_lenient),
            null_name=f"as many {self.guesses.source} (at most {MOST})",
            note="a published success rule that guesses meet; no measure of recovery",
        )

    def _identified(self) -> Metric:
        return replace(
            self._share(f"re-identification, own patient first of {self.patients}", self.scored.rank == 1),
            null=_mean(self.scored.guess_rank == 1),
            null_name=self.guesses.best_name,
            second_null=1 / self.patients,
            second_null_name="chance",
        )

    def _share(self, name: str, hits: Tensor) -> Metric:
        low, high = share_interval(hits.numpy(), self.scored.matched.patient)
        return Metric(name=name, value=_mean(hits), low=low, high=high, n=len(hits))

    def _over(
        self,
        name: str,
        of: Callable[[Quality], Tensor],
        statistic: Callable[[Any], Any] = np.mean,
        *,
        unit: str = "",
        note: str = "",
    ) -> Metric:
        """The ``statistic`` over the originals of which ``of`` can be told."""
        values = of(self.scored.found).numpy()
        told = np.isfinite(values)
        values, owners = values[told], [self.scored.matched.patient[row] for row in np.flatnonzero(told)]
        if not len(values):
            return Metric(name=name, value=None, unit=unit, note=note)
        low, high = bootstrap(lambda rows: float(statistic(values[rows])), owners, seed=self.seed) or (None, None)
        nulls = self._nulls(lambda quality: of(quality)[told], statistic)
        return Metric(name=name, value=float(statistic(values)), low=low, high=high, n=len(values), unit=unit, note=note, **nulls)

    def _nulls(self, of: Callable[[Quality], Tensor], statistic: Callable[[Any], Any] = np.mean) -> dict[str, Any]:
        return {
            "null": float(statistic(of(self.scored.guessed).numpy())),
            "null_name": self.guesses.best_name,
            "second_null": float(statistic(of(self.scored.average).numpy())),
            "second_null_name": self.guesses.mean_name,
        }


def _mean(hits: Tensor) -> float:
    return float(hits.double().mean())
