"""Inverting gradients: cosine matching with total variation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.inversion.labels import recover
from flpriv.attacks.inversion.objective import cosine
from flpriv.attacks.inversion.regularisers import total_variation
from flpriv.attacks.inversion.search import Found, descend
from flpriv.attacks.inversion.unroll import Replay, replay
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class InvertingGradients(Attack):
    """Finds images whose update points where the observed one does, by signed Adam on cosine distance and total variation.

    An update of several local steps is matched by replaying the steps on the trial. Labels that are not granted are read from the
    last layer; where their order matters and is not granted, each restart draws one. Restarts are judged by the objective alone.

    Args:
        iterations: of the search, ≥ 1.
        lr: first step of Adam, on images in [0, 1].
        tv: weight of the total variation, ≥ 0; more suits noisy updates, less suits deep networks.
        signed: feed Adam the sign of the gradient, not the gradient.
        restarts: searches from fresh noise for each update, ≥ 1.
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
        max_steps: refuse updates of more local steps than this.
        max_images: refuse updates of more distinct images than this.
    """

    name: ClassVar[str] = "inverting-gradients"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL
    paper: ClassVar[str] = "Geiping et al. 2020, https://arxiv.org/abs/2003.14053"

    iterations: Annotated[int, Field(ge=1)] = 1000
    lr: Annotated[float, Field(gt=0)] = 0.1
    tv: Annotated[float, Field(ge=0)] = 0.01
    signed: bool = True
    restarts: Annotated[int, Field(ge=1)] = 1
    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None
    max_steps: Annotated[int, Field(ge=1)] = 16
    max_images: Annotated[int, Field(ge=1)] = 64

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update attacked, with ``labels`` and the ``objective``, scalar.

        Raises:
            FlprivError: if there is no honest update in ``rounds``, if the sites do not train by SGD, or if an update is beyond
                ``max_steps`` or ``max_images``.
        """
        honest = [o for o in capture.observations if o.node is not None and not o.trap]
        seen = [o for o in honest if not self.rounds or o.round in self.rounds]
        if not seen:
            where = f"rounds {', '.join(map(str, self.rounds))}" if self.rounds else "any round"
            raise FlprivError(f"{self.name}: no honest update was captured in {where}; set the option rounds")
        return [self._invert(capture, observation, rng) for observation in track(seen[: self.limit], self.name)]

    def _invert(self, capture: Capture, seen: Observation, rng: torch.Generator) -> Reconstruction:
        site = self._replay(capture, seen)
        lr, update = site.recipe.lr, seen.update
        device = next(iter(site.start.values())).device
        observed = [update[name].to(device) / -lr for name in site.start]
        changed = [place for place, value in enumerate(observed) if bool(value.any())] or list(range(len(observed)))
        target = [observed[place] for place in changed]
        labels = self._labels(capture, seen, site, observed, rng).to(device)
        ordered = Can.KNOW_ORDER in capture.granted or len(set(site.batches)) == 1

        def search() -> tuple[Found, Tensor]:
            given = labels if ordered else labels[torch.randperm(len(labels), generator=rng).to(device)]
            start = torch.rand((site.images, *capture.task.shape), generator=rng).to(device)

            def loss(images: Tensor) -> Tensor:
                moved = site(images, given)
                return cosine([moved[place] for place in changed], target) + self.tv * total_variation(images)

            found = descend(loss, start, iterations=self.iterations, lr=self.lr, signed=self.signed, what=self.name)
            return found, given

        found, given = min((search() for _ in range(self.restarts)), key=lambda end: float(end[0].objective))
        return Reconstruction(
            images=found.images.cpu(), round=seen.round, node=seen.node, labels=given.cpu(), objective=found.objective.cpu()
        )

    def _replay(self, capture: Capture, seen: Observation) -> Replay:
        if seen.local is None:
            raise FlprivError(f"{self.name}: round {seen.round}, node {seen.node}: the capture lacks the local recipe")
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        site = replay(capture.task, seen.sent, recipe=seen.local, examples=seen.examples, device=device)
        if len(site.batches) == 1 and seen.labels is not None and len(seen.labels):
            site = site.of(len(seen.labels))
        steps, images = len(site.batches), site.images
        if steps > self.max_steps or images > self.max_images:
            raise FlprivError(
                f"{self.name}: round {seen.round}, node {seen.node}: {steps} local steps on {images} images are more than "
                f"max_steps = {self.max_steps} or max_images = {self.max_images}; raise these options or lower local.steps"
            )
        return site

    def _labels(
        self, capture: Capture, seen: Observation, site: Replay, observed: Sequence[Tensor], rng: torch.Generator
    ) -> Tensor:
        """``(images,)`` int64 in order of first use where the order is granted, else sorted."""
        if seen.labels is not None and len(seen.labels):
            uses = sum(map(len, site.batches))
            if len(seen.labels) != uses:
                raise FlprivError(
                    f"{self.name}: round {seen.round}, node {seen.node}: {len(seen.labels)} labels for {uses} uses of images; "
                    "the sites do not follow the local recipe"
                )
            return seen.labels[: site.images] if Can.KNOW_ORDER in capture.granted else seen.labels[:: uses // site.images]
        if capture.public is not None:
            public = capture.public.take(torch.randperm(len(capture.public), generator=rng)[:64])
            guesses, guessed = public.images, public.labels
        else:
            guesses, guessed = torch.rand((16, *capture.task.shape), generator=rng), torch.full((16,), -1)
        device = observed[0].device
        return recover(site, observed, classes=len(capture.task.classes), guesses=guesses.to(device), guessed=guessed.to(device))
