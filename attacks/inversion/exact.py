"""Which exact inversion an update allows, and its result where replaying it gives the update back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from flpriv.attacks.inversion import dense_relu, layer_peeling, linear_layer, r_gap
from flpriv.attacks.inversion.first_layer import FirstLayer, first_layer, images_behind
from flpriv.attacks.inversion.unroll import Replay, batches, replay
from flpriv.capture import Capture, Observation
from flpriv.claim import Reconstruction
from flpriv.errors import FlprivError
from flpriv.task import Task

_UNKNOWNS = 4096
_SAMPLES = 60_000
_EVALUATIONS = 400
_EXACT, _TURNED = 1e-3, 2e-2
"""Largest part of an update that an exact inversion may leave unexplained, beyond the rounding of float32."""


def invert_exactly(capture: Capture, observation: Observation, *, rng: torch.Generator) -> Reconstruction | None:
    """The images behind an update, where architecture and recipe let them be computed rather than searched for.

    A dense first layer gives up a single image whatever the number of local steps and, before a ReLU, a whole batch if every
    step sees it; from one step through convolutions, R-GAP takes a single image and layer peeling fewer images than classes.
    Replaying the round on what was found must give the update back: the ``objective`` of a claim is the relative error of that,
    up to scale, at most .001 and rounding, or .02 for layer peeling, since a deep network's gradient jumps where the least error
    of an image turns a ReLU. ``None`` otherwise: in a moment where the architecture allows nothing, within seconds elsewhere.

    Args:
        capture: whose task it is.
        observation: the update; with its local recipe, or nothing can be replayed.
        rng: for the samples of ``dense-relu`` and the first trials of ``layer-peeling``.
    """
    seen, task = observation, capture.task
    images = images_behind(seen)
    if seen.local is None or seen.local.optimizer != "sgd" or seen.node is None or seen.trap or images is None:
        return None
    site = replay(task, seen.sent, recipe=seen.local, examples=seen.examples, device=torch.device("cpu"))
    for way, most in ((_by_first_layer, _EXACT), (_by_every_layer, _EXACT), (_by_last_layer, _TURNED)):
        claim = way(capture, seen, images, rng)
        right = _verified(claim, site, seen, most=most) if claim is not None else None
        if right is not None:
            return right
    return None


def _by_first_layer(capture: Capture, seen: Observation, images: int, rng: torch.Generator) -> Reconstruction | None:
    layer = _dense(capture.task)
    if layer is not None and images == 1:
        return linear_layer.invert(capture.task, seen, layer)
    if layer is not None and layer.rectified and images < layer.neurons and len(set(_steps(seen))) == 1:
        return dense_relu.invert(capture.task, seen, layer, rng=rng, samples=_SAMPLES, agreement=0.95)
    return None


def _by_every_layer(capture: Capture, seen: Observation, images: int, rng: torch.Generator) -> Reconstruction | None:
    stages = _stages(capture.task) if _steps(seen) == ((0,),) else None
    return r_gap.invert(capture.task, seen, stages) if stages is not None else None


def _by_last_layer(capture: Capture, seen: Observation, images: int, rng: torch.Generator) -> Reconstruction | None:
    if len(_steps(seen)) > 1 or images >= len(capture.task.classes) or layer_peeling.obstacle(capture.task) is not None:
        return None
    return layer_peeling.invert(capture, seen, rng=rng, iterations=_EVALUATIONS, restarts=1)


def _steps(seen: Observation) -> tuple[tuple[int, ...], ...]:
    assert seen.local is not None
    return batches(seen.local, examples=seen.examples)


def suits(task: Task) -> str | None:
    """Which exact inversion the architecture allows, in a sentence; ``None`` for none."""
    layer = _dense(task)
    if layer is not None and layer.rectified:
        return (
            f"The first layer is dense before a ReLU: batches much smaller than its {layer.neurons} neurons are inverted exactly."
        )
    if layer is not None:
        return "The first layer is dense: updates of a single image are inverted exactly."
    if _stages(task) is not None:
        return "The layers can be inverted one by one: one step on a single image is inverted exactly where ranks allow it."
    if layer_peeling.obstacle(task) is None:
        return (
            "The layers can be peeled from the last one: one step on fewer images than classes is inverted where ranks allow it."
        )
    return None


def _dense(task: Task) -> FirstLayer | None:
    try:
        return first_layer(task, who="exact")
    except FlprivError:
        return None


def _stages(task: Task) -> Sequence[r_gap.Stage] | None:
    try:
        return r_gap.stages_of(task, unknowns=_UNKNOWNS, who="exact")
    except FlprivError:
        return None


def _verified(claim: Reconstruction, site: Replay, seen: Observation, *, most: float) -> Reconstruction | None:
    """The claim with the part of the update that its replay leaves unexplained as ``objective``; ``None`` if that is too much."""
    images, labels = claim.images, claim.labels
    if labels is None or not len(images):
        return None
    site = replace(site, batches=(tuple(range(len(images))),) * len(site.batches))
    observed = [seen.sent[name].double() - seen.returned[name].double() for name in site.start]
    rounding = torch.finfo(torch.float32).eps * _norm([seen.sent[name] for name in site.start]) / max(_norm(observed), 1e-300)
    missed = _missed(site(images, labels), observed)
    if missed > most + rounding and len(images) > 1 and len(site.batches) == 1:
        missed = _missed(site(images, _weighed(images, labels, site, observed)), observed)
    return replace(claim, objective=torch.tensor(missed)) if missed <= most + rounding else None


def _weighed(images: Tensor, labels: Tensor, site: Replay, observed: Sequence[Tensor]) -> Tensor:
    """Labels ``(N, classes)`` times the weight each image has in the update, as under a balanced loss, by least squares."""
    small = [place for place, value in enumerate(observed) if value.dim() == 1]
    alone = [site.of(1)(image[None], label[None]) for image, label in zip(images, labels, strict=True)]
    columns = torch.stack([torch.cat([moved[place].double() for place in small]) for moved in alone], 1)
    weights = torch.linalg.lstsq(columns, torch.cat([observed[place] for place in small])[:, None]).solution[:, 0]
    weighed: Tensor = one_hot(labels, site.model(images[:1]).shape[1]) * (weights / weights.mean())[:, None].float()
    return weighed


def _missed(moved: Sequence[Tensor], observed: Sequence[Tensor]) -> float:
    """``min |observed - a moved| / |observed|`` over a > 0: the scale is left to learning rates and clipping."""
    inner = sum(float((one.double() * other).sum()) for one, other in zip(moved, observed, strict=True))
    factor = max(inner, 0.0) / max(_norm(moved) ** 2, 1e-300)
    return _norm([other - factor * one.double() for one, other in zip(moved, observed, strict=True)]) / max(
        _norm(observed), 1e-300
    )


def _norm(values: Sequence[Tensor]) -> float:
    return math.sqrt(sum(float(value.double().square().sum()) for value in values))
