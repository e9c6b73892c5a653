"""Deep leakage from gradients: images and labels searched for together."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import Evidence
from flpriv.attacks.inversion.matching import MatchingAttack
from flpriv.attacks.inversion.objective import relative
from flpriv.attacks.inversion.plan import Plan, Space
from flpriv.attacks.inversion.search import LBFGS
from flpriv.capture import Capture


@dataclass(frozen=True, kw_only=True)
class DLG(MatchingAttack):
    """Finds images and soft labels together whose update is the observed one, by L-BFGS on the squared distance.

    Labels are searched for even where they are granted. Made for smooth activations; searches from some starts diverge, which is
    what restarts are for. Published with 300 steps of L-BFGS, each of several evaluations; ``iterations`` counts evaluations.

    Args:
        iterations: evaluations of each problem, ≥ 1.
        restarts: searches from fresh starts for each update, ≥ 1.
    """

    name: ClassVar[str] = "dlg"
    paper: ClassVar[str] = "Zhu et al. 2019, https://arxiv.org/abs/1906.08935"

    iterations: Annotated[int, Field(ge=1)] = 1000
    restarts: Annotated[int, Field(ge=1)] = 2

    def plan(self, evidence: Evidence, capture: Capture, *, rng: torch.Generator) -> Plan:
        """Without a box: a trial is all pixels and the logits of all labels in a row."""
        shape, classes = capture.task.shape, len(capture.task.classes)

        def encode(images: Tensor, labels: Tensor) -> Tensor:
            logits = torch.randn((len(labels), classes), generator=rng)
            return torch.cat([images.flatten(), logits.to(images).flatten()])

        def decode(trial: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
            images, logits = trial.tensor_split([len(trial) - classes * len(labels)])
            return images.view(len(labels), *shape), logits.view(len(labels), classes).softmax(1)

        return Plan(
            optimiser=LBFGS(box=False, history=50, patience=100),
            iterations=self.iterations,
            objective=relative,
            start=start.grey,
            space=Space(encode=encode, decode=decode),
        )
