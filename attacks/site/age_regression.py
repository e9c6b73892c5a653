"""Age regression: the features of a trained model tell how old a patient is, in years."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.site.features import PIXELS, UNTRAINED, looked_at
from flpriv.attacks.site.probes import head_regression, ridge
from flpriv.bands import years
from flpriv.capture import Capture
from flpriv.claim import Estimate, Goal
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.threat import Can

MEAN = "mean age"
FEW = 8
"""Exposed records that must tell their age."""


@dataclass(frozen=True, kw_only=True)
class AgeRegression(Attack):
    """Trains regressions on the final model's features of a few exposed records, and estimates every candidate's age.

    Two probes, the head of the paper with one output and a ridge regression, look at the features of the trained model (the
    attack), those of the same architecture with untrained weights, and plain pixel statistics; the mean age of the exposed
    records is the fourth guess. All but the attack are baselines, which come as claims of their own.

    Args:
        repeats: seeds of the head and of the untrained weights; the paper asks for at least 5.
        epochs: of the head.
    """

    name: ClassVar[str] = "age-regression"
    goal: ClassVar[Goal] = Goal.ATTRIBUTE
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_EXPOSED | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Exploring Privacy on a Federated Medical Imaging Platform, https://github.com/edhlee/FLPrivacy"

    repeats: Annotated[int, Field(ge=1)] = 5
    epochs: Annotated[int, Field(ge=1)] = 20

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Estimate]:
        """Claims in years of each probe on each kind of features, those without randomness once.

        Raises:
            CaptureError: if there are no candidates, or fewer than eight exposed records tell an age.
            UpdateError: if the captured model is not the task's.
            ScenarioError: for a model without a dense layer.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        column = capture.exposed.attributes.get("age", ()) if capture.exposed is not None else ()
        told = [(row, age) for row, age in enumerate(map(years, column)) if age is not None]
        if capture.exposed is None or len(told) < FEW:
            raise CaptureError(f"{self.name}: {len(told)} exposed records tell their age, {FEW} are needed")
        exposed = capture.exposed.images[[row for row, _ in told]]
        ages, asked = torch.tensor([age for _, age in told], dtype=torch.float64), capture.candidates.images
        seeds = torch.randint(2**31, (self.repeats,), generator=rng).tolist()
        everywhere = range(self.repeats)
        claims = [self._claim(ages.mean().expand(len(asked)), "mean", MEAN, 0)]
        plan = [("", everywhere), *((UNTRAINED, range(i, i + 1)) for i in everywhere), (PIXELS, everywhere)]
        for baseline, repeats in track(plan, self.name):
            known, unknown = (
                looked_at(capture, baseline, images, seed=seeds[repeats[0]], who=self.name) for images in (exposed, asked)
            )
            for repeat in repeats:
                found = head_regression(known, ages, unknown, epochs=self.epochs, seed=seeds[repeat])
                claims.append(self._claim(found, "head", baseline, repeat))
            claims.append(self._claim(ridge(known, ages, unknown), "ridge regression", baseline, repeats[0]))
        return claims

    def _claim(self, values: Tensor, probe: str, baseline: str, repeat: int) -> Estimate:
        return Estimate(attribute="age", values=values, probe=probe, baseline=baseline, repeat=repeat)
