"""Linear layer: a dense first layer's update is an image times a number for each neuron."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from flpriv.attack import Attack
from flpriv.attacks.inversion.evidence import honest
from flpriv.attacks.inversion.first_layer import FirstLayer, descent, first_layer, images_behind, require_sgd
from flpriv.attacks.inversion.labels import idlg, marks_of
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class LinearLayer(Attack):
    """Divides the update of a dense first layer's weights by that of its biases: the image, without any search.

    For one image x, neuron k moves its weights by d_k x and its bias by d_k. That holds for every step of SGD on the same image,
    with momentum and weight decay too, so any number of local steps will do as long as all see one image. A mixture of several
    images comes out of larger batches, which are refused where the recipe tells their size.

    Args:
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
    """

    name: ClassVar[str] = "linear-layer"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES
    paper: ClassVar[str] = "Phong et al. 2018, https://eprint.iacr.org/2017/715"

    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update: an image with its label and, as ``confidence``, the share of the update it explains.

        An update that is zero gives a claim of no images.

        Raises:
            FlprivError: if the first layer is not dense, there is no honest update in ``rounds``, the sites do not train by SGD,
                or a site used several images.
        """
        layer = first_layer(capture.task, who=self.name)
        seen = honest(capture, rounds=self.rounds, limit=self.limit, who=self.name)
        return [self._invert(capture.task, observation, layer) for observation in track(seen, self.name)]

    def _invert(self, task: Task, seen: Observation, layer: FirstLayer) -> Reconstruction:
        require_sgd(seen, who=self.name)
        if (images := images_behind(seen)) is not None and images > 1:
            raise FlprivError(
                f"{self.name}: round {seen.round}, node {seen.node}: {images} images are behind the update and this attack reads "
                "one; set local.batch_size = 1 and local.steps = 1, or try 'dense-relu'"
            )
        return invert(task, seen, layer)


def invert(task: Task, seen: Observation, layer: FirstLayer) -> Reconstruction:
    """The image behind an update of one image; none where the update of ``layer`` is zero."""
    moved = descent(seen, (f"{layer.name}.weight", f"{layer.name}.bias"))
    pixels, explained = read(moved[f"{layer.name}.weight"], moved[f"{layer.name}.bias"])
    found = int(explained > 0)
    label = single_label(task, seen)
    return Reconstruction(
        images=as_images(pixels[None], task)[:found],
        round=seen.round,
        node=seen.node,
        labels=None if label is None else torch.full((found,), label),
        confidence=torch.full((found,), explained, dtype=torch.float64),
        method="exact: dense layer",
    )


def read(weight: Tensor, bias: Tensor) -> tuple[Tensor, float]:
    """The x for which ``weight`` is nearest to ``bias`` ⊗ x, and the share of ``weight`` that it explains.

    All neurons are weighed together, which averages rounding and noise. Entries that are exactly zero, as a compression leaves
    them, count for nothing.

    Paper: Phong et al. 2018, https://eprint.iacr.org/2017/715.

    Args:
        weight: ``(K, P)``, the gradient of the weights times any number.
        bias: ``(K,)``, the gradient of the biases times the same number.

    Returns:
        x ``(P,)`` float64, zero where nothing is said of a pixel, and ``1 - |weight - bias ⊗ x| / |weight|`` in [0, 1].
    """
    above = torch.zeros(weight.shape[1], dtype=torch.float64)
    below, whole = torch.zeros_like(above), torch.zeros((), dtype=torch.float64)
    for row, scale in zip(weight, bias.double(), strict=True):
        wide = row.double()
        above += scale * wide
        below += scale.square() * (wide != 0)
        whole += wide.square().sum()
    x = torch.where(below > 0, above / below.clamp_min(torch.finfo(torch.float64).tiny), 0.0)
    missed = (whole - (x * above).sum()).clamp_min(0)
    return x, float(1 - (missed / whole).sqrt()) if float(whole) > 0 and bool(bias.any()) else 0.0


def as_images(pixels: Tensor, task: Task) -> Tensor:
    """Normalised ``pixels`` ``(N, P)`` as images ``(N, *task.shape)``, float32 in [0, 1]."""
    return (pixels * task.std + task.mean).nan_to_num(0.0).clamp(0, 1).float().view(-1, *task.shape)


def single_label(task: Task, seen: Observation) -> int | None:
    """The label of a single image, read from the last layer (iDLG); ``None`` where no layer ends in the classes."""
    try:
        return idlg(marks_of(descent(seen, [name for name, _ in task.build().named_parameters()]), classes=len(task.classes)))
    except FlprivError:
        return None
