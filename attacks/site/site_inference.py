"""Site inference: the features of a trained model tell which hospital an image comes from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.site.features import PIXELS, UNTRAINED, looked_at
from flpriv.attacks.site.probes import head, logistic
from flpriv.bands import band, bands
from flpriv.capture import Capture
from flpriv.claim import Attribute, Goal
from flpriv.errors import CaptureError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class SiteInference(Attack):
    """Trains probes on the final model's features of a few exposed records, and guesses an attribute of every candidate.

    Two probes, the head of the paper and a logistic regression, look at three kinds of features: those of the trained model (the
    attack), those of the same architecture with untrained weights, and plain pixel statistics (the baselines, which come as
    claims of their own).

    Args:
        attribute: what to guess.
        repeats: seeds of the head and of the untrained weights; the paper asks for at least 5.
        epochs: of the head.
        edges: years at which a new age band begins, rising.
    """

    name: ClassVar[str] = "site-inference"
    goal: ClassVar[Goal] = Goal.ATTRIBUTE
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_EXPOSED | Can.KNOW_CANDIDATES
    paper: ClassVar[str] = "Exploring Privacy on a Federated Medical Imaging Platform, https://github.com/edhlee/FLPrivacy"

    attribute: Literal["site", "sex", "age"] = "site"
    repeats: Annotated[int, Field(ge=1)] = 5
    epochs: Annotated[int, Field(ge=1)] = 20
    edges: tuple[Annotated[int, Field(ge=1)], ...] = (40, 60, 80)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Attribute]:
        """Claims of each probe on each kind of features; those without randomness are made once, the others ``repeats`` times.

        Raises:
            CaptureError: if there are no candidates, or the exposed records tell fewer than two values of the attribute.
            UpdateError: if the captured model is not the task's.
            ScenarioError: for a model without a dense layer.
        """
        exposed, codes, classes = self._known(capture)
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        asked = capture.candidates.images
        seeds = torch.randint(2**31, (self.repeats,), generator=rng).tolist()
        everywhere = range(self.repeats)
        plan = [("", everywhere), *((UNTRAINED, range(i, i + 1)) for i in everywhere), (PIXELS, everywhere)]
        claims = []
        for baseline, repeats in track(plan, self.name):
            known, unknown = (
                looked_at(capture, baseline, images, seed=seeds[repeats[0]], who=self.name) for images in (exposed.images, asked)
            )
            for repeat in repeats:
                guess = head(known, codes, unknown, classes=len(classes), epochs=self.epochs, seed=seeds[repeat])
                claims.append(self._claim(classes, guess, "head", baseline, repeat))
            guess = logistic(known, codes, unknown, classes=len(classes))
            claims.append(self._claim(classes, guess, "logistic probe", baseline, repeats[0]))
        return claims

    def _known(self, capture: Capture) -> tuple[Records, Tensor, tuple[str, ...]]:
        """The exposed records whose attribute is known, their class codes, and the classes."""
        exposed = capture.exposed
        values = list(exposed.attributes.get(self.attribute, ())) if exposed is not None else []
        if self.attribute == "age":
            names = bands(self.edges)
            values = [band(value, names) for value in values]
            classes = tuple(name for name in names if name in values)
        else:
            classes = tuple(sorted(set(values) - {""}))
        if exposed is None or len(classes) < 2:
            told = ", ".join(classes) or "none"
            raise CaptureError(f"{self.name}: the exposed records tell fewer than two values of {self.attribute!r} ({told})")
        rows = [i for i, value in enumerate(values) if value]
        return exposed.take(rows), torch.tensor([classes.index(values[i]) for i in rows]), classes

    def _claim(self, classes: tuple[str, ...], guess: Tensor, probe: str, baseline: str, repeat: int) -> Attribute:
        return Attribute(
            attribute=self.attribute, classes=classes, probabilities=guess, probe=probe, baseline=baseline, repeat=repeat
        )
