"""Attacks by reference models: how sure the attacked model is of a record, against how sure models are that never saw it."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack
from flpriv.attacks.frozen import frozen
from flpriv.attacks.membership.federation import course
from flpriv.attacks.membership.shadows import pool, shadows
from flpriv.capture import Capture
from flpriv.claim import Goal, Membership
from flpriv.errors import CaptureError
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class Answers:
    """What the attacked model (row 0 of ``logits``) and R reference models say to the same N records.

    Args:
        logits: ``(1 + R, N, classes)`` float64.
        labels: ``(N,)`` class indices.
        inside: ``(R, N)`` bool, which records each reference model was trained on.
    """

    logits: Tensor
    labels: Tensor
    inside: Tensor

    def probability(self, *, temperature: float = 1.0) -> Tensor:
        """Softmax probability of each record's own label: ``(1 + R, N)``.

        Args:
            temperature: divides the logits.
        """
        return self._own(torch.softmax(self.logits / temperature, dim=2))

    def losses(self) -> Tensor:
        """Cross-entropies ``(1 + R, N)`` in nats, which tell certain predictions apart too."""
        return torch.nn.functional.softplus(-self.confidence())

    def confidence(self) -> Tensor:
        """φ = log p_y - log(1 - p_y): ``(1 + R, N)``."""
        own = torch.nn.functional.one_hot(self.labels, self.logits.shape[2]).bool()
        return self._own(self.logits) - self.logits.masked_fill(own, -torch.inf).logsumexp(2)

    def _own(self, values: Tensor) -> Tensor:
        index = self.labels.expand(len(values), -1)[:, :, None]
        return values.gather(2, index)[:, :, 0]


@dataclass(frozen=True, kw_only=True)
class ReferenceAttack(Attack):
    """An attack that compares the final model with shadow federations; a named attack adds its :meth:`score` alone.

    Shadows follow the recipe, nodes and rounds that the capture tells, and start from its first model where the adversary saw
    it. An adversary who saw no training takes it to have been central, with Adam at 1e-3 for ``epochs`` passes. Defences of the
    sites that are not part of the model are not repeated. All attacks of a run with the same ``seed`` share their shadows.

    Args:
        shadows: reference models, trained in pairs on opposite halves: each record is in one of both, with ``pool = "public"``
            in none.
        pool: what they are trained on: ``"candidates"``, halves of the records asked about filled up with public images, or
            ``"public"`` images alone.
        epochs: of their training where the capture does not tell the recipe.
        seed: of their halves and training.
        ray: address of a Ray cluster that trains them, ``"local"`` to start one here; empty for processes of this machine.
    """

    goal: ClassVar[Goal] = Goal.MEMBERSHIP
    needs: ClassVar[Can] = Can.SEE_FINAL | Can.KNOW_CANDIDATES

    shadows: Annotated[int, Field(ge=2, multiple_of=2)] = 4
    pool: Literal["candidates", "public"] = "candidates"
    epochs: Annotated[int, Field(ge=1)] = 30
    seed: Annotated[int, Field(ge=0)] = 0
    ray: str = ""

    @abstractmethod
    def score(self, candidates: Answers, public: Answers | None) -> Tensor:
        """``(N,)`` float64, larger means more likely a member.

        Args:
            candidates: of the records asked about.
            public: of the public images, ``None`` where there are none.
        """

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Membership]:
        """One claim about the federation; training is seeded by ``seed``, so that attacks share it, and ``rng`` is not used.

        Raises:
            CaptureError: for a capture without candidates, or without the images that shadows need.
            UpdateError: if the captured model is not the task's.
        """
        if capture.candidates is None or not len(capture.candidates):
            raise CaptureError(f"{self.name}: the capture holds no candidates")
        model = frozen(capture.task, capture.final, who=f"{self.name}: the final model")
        way = course(capture, epochs=self.epochs)
        trained_on = pool(capture, way, asked=self.pool == "candidates", who=self.name)
        records = [part for part in (capture.candidates, capture.public) if part is not None and len(part)]
        said = [[logits(model, part.images)] for part in records]
        inside: list[list[Tensor]] = [[] for _ in records]
        for shadow in shadows(capture, way, trained_on, count=self.shadows, seed=self.seed, ray=self.ray):
            model.load_state_dict(dict(shadow.state))
            for place, part in enumerate(records):
                said[place].append(logits(model, part.images))
                inside[place].append((shadow.candidates, shadow.public)[place])
        answers = [
            Answers(logits=torch.stack(said[i]), labels=part.labels, inside=torch.stack(inside[i]))
            for i, part in enumerate(records)
        ]
        return [Membership(scores=self.score(answers[0], answers[1] if len(answers) > 1 else None))]


@torch.inference_mode()
def logits(model: nn.Module, images: Tensor, *, chunk: int = 64) -> Tensor:
    """What ``model`` says to each image: ``(N, classes)`` float64 on the CPU."""
    device, layout = next(model.parameters()).device, (torch.channels_last if images.dim() == 4 else torch.channels_last_3d)
    return torch.cat([model(part.to(device, memory_format=layout)).cpu() for part in torch.split(images, chunk)]).double()


def mean_out(values: Tensor, inside: Tensor) -> Tensor:
    """Mean over the reference models that were not trained on a record: ``(R, N)`` to ``(N,)``."""
    out = (~inside).to(values.dtype)
    return (values * out).sum(0) / out.sum(0)
