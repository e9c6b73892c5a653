"""Dense + ReLU: whole batches out of the gradient of a dense first layer, exactly and without any search."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.inversion import linear_layer
from flpriv.attacks.inversion.evidence import honest
from flpriv.attacks.inversion.first_layer import FirstLayer, descent, first_layer, images_behind, require_sgd, slopes_at
from flpriv.attacks.inversion.kernels import agreement_of, separate
from flpriv.attacks.inversion.mixture import mixture
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class DenseReLU(Attack):
    """Takes the gradient of a dense first layer before a ReLU apart into the images of the batch, exactly.

    The gradient is a product of two factors of as many dimensions as images; ReLUs leave half of one empty, which makes them
    unique. The rank tells the size of the batch. What is found is held against the model: an image must turn on just the
    neurons it sent something to. Works on a step of SGD, through clipping, and on several steps over few images, whatever their
    order, as long as they turn few neurons on or off; not on noisy or compressed updates. A layer of 400 neurons gives up batches
    of 16, one of 1000 batches of 24.

    Args:
        samples: how many sets of neurons to try for each update, ≥ 1; 100,000 take seconds.
        agreement: claim images that agree with the ReLUs at least as well, in (0, 1]; 1 is what one step gives, .9 allows for
            several steps and for some images that are none.
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
    """

    name: ClassVar[str] = "dense-relu"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES
    paper: ClassVar[str] = "Dimitrov et al. 2024, https://arxiv.org/abs/2403.03945"

    samples: Annotated[int, Field(ge=1)] = 300_000
    agreement: Annotated[float, Field(gt=0, le=1)] = 0.95
    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update: images with their labels and their agreement with the ReLUs as ``confidence``.

        Where the images cannot be told apart, or the model does not bear them out, the claim holds no images.

        Raises:
            FlprivError: if the first layer is not dense before a ReLU, there is no honest update in ``rounds``, the sites do not
                train by SGD, or more images than neurons are behind an update.
        """
        layer = first_layer(capture.task, who=self.name)
        if not layer.rectified:
            raise FlprivError(f"{self.name}: the first layer, {layer.name!r}, is not followed by a ReLU; leave the attack out")
        seen = honest(capture, rounds=self.rounds, limit=self.limit, who=self.name)
        return [self._invert(capture.task, observation, layer, rng) for observation in track(seen, self.name)]

    def _invert(self, task: Task, seen: Observation, layer: FirstLayer, rng: torch.Generator) -> Reconstruction:
        require_sgd(seen, who=self.name)
        if (images := images_behind(seen)) is not None and images >= layer.neurons:
            raise FlprivError(
                f"{self.name}: round {seen.round}, node {seen.node}: {images} images are behind the update of {layer.neurons} "
                "neurons, which tell fewer images than they are apart; lower local.batch_size and set local.steps"
            )
        return invert(task, seen, layer, rng=rng, samples=self.samples, agreement=self.agreement)


def invert(
    task: Task, seen: Observation, layer: FirstLayer, *, rng: torch.Generator, samples: int, agreement: float
) -> Reconstruction:
    """The images behind an update of ``layer`` that agree with the ReLUs; perhaps none."""
    keys = (f"{layer.name}.weight", f"{layer.name}.bias")
    mix = mixture(descent(seen, keys), {key: seen.sent[key] for key in keys}, layer)
    if mix is not None and mix.images == 1:
        return linear_layer.invert(task, seen, layer)
    kernels = separate(mix, rng=rng, samples=samples, agreement=agreement, what="dense-relu") if mix is not None else None
    if mix is None or kernels is None:
        images, labels, agreed = torch.zeros((0, *task.shape)), torch.zeros(0, dtype=torch.long), torch.zeros(0)
    else:
        pixels, sends, on = mix.read(kernels)
        agreed = agreement_of(sends, on)
        kept = agreed >= agreement
        images, agreed = linear_layer.as_images(pixels[kept], task), agreed[kept]
        labels = _blamed(task, seen, layer, images, sends[:, kept], mix.neurons)
    return Reconstruction(
        images=images, round=seen.round, node=seen.node, labels=labels, confidence=agreed.double(), method="exact: dense + ReLU"
    )


def _blamed(task: Task, seen: Observation, layer: FirstLayer, images: Tensor, sends: Tensor, neurons: Tensor) -> Tensor:
    """The labels ``(N,)`` under which the images send ``neurons`` of ``layer`` what they sent, ``(M, N)``, up to a factor."""
    model = task.build().eval()
    model.load_state_dict(dict(seen.sent))
    part = model.get_submodule(layer.name)
    scores = []
    for label in range(len(task.classes)):
        _, slopes = slopes_at(model, part, images, torch.full((len(images),), label))
        alone = slopes[:, neurons].double()
        scores.append((alone * sends.T).sum(1) / alone.norm(dim=1).clamp_min(1e-30))
    return torch.stack(scores).argmax(0)
