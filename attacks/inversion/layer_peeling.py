"""Layer peeling: batches out of convolutional networks, layer by layer from the last one up to where images show."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from statistics import median
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from flpriv.attack import Attack
from flpriv.attacks.inversion import start
from flpriv.attacks.inversion.evidence import gather, honest, sensitivity
from flpriv.attacks.inversion.first_layer import descent, require_sgd
from flpriv.attacks.inversion.objective import cosine
from flpriv.attacks.inversion.peeling import Inside, Network, network, peel
from flpriv.attacks.inversion.search import LBFGS
from flpriv.attacks.inversion.smoothing import smoothed
from flpriv.attacks.inversion.unroll import batches
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.task import Task
from flpriv.threat import Can

_SHARPNESS = (3.0, 10.0, 30.0, 100.0, torch.inf)
_FOUND, _ENOUGH = 1e-9, 1e-12
"""Relative squared distance of features below which an image counts as found, and at which the search for it ends."""


@dataclass(frozen=True, kw_only=True)
class LayerPeeling(Attack):
    """Computes what each image of a batch was inside the network, from the last layer up, and the images from the earliest of it.

    The gradient of the last dense layer falls apart into the images' own, as many as there are classes less one at most; what
    went into a convolution follows from its gradient and what came down to it, by a linear system; and which ReLUs were on from
    what went into the next layer. Under global pooling, patterns of ReLUs are tried until one fits, for up to 18 outputs of a
    channel over all images. All of that is exact and separates the images; what remains is to find the image behind the features
    of a shallow network, which is easy. Works on one step of plain SGD with batch normalisation in eval mode; rounding to float32
    is all the noise it bears.

    Args:
        iterations: evaluations of each search for images behind features, ≥ 1.
        restarts: further searches for images whose features are not met, ≥ 0.
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
    """

    name: ClassVar[str] = "layer-peeling"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES | Can.KNOW_LOCAL
    paper: ClassVar[str] = "after Zhu and Blaschko 2021, https://arxiv.org/abs/2010.07733"

    iterations: Annotated[int, Field(ge=1)] = 400
    restarts: Annotated[int, Field(ge=0)] = 2
    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update: images with their labels, and as ``objective`` the cosine distance of their update to it.

        Where too little inside the network could be told, the claim holds no images.

        Raises:
            FlprivError: for a model it does not apply to, if there is no honest update in ``rounds``, or if an update is not one
                step of SGD on fewer images than classes.
        """
        if (wrong := obstacle(capture.task)) is not None:
            raise FlprivError(f"{self.name}: {wrong}; leave the attack out")
        seen = honest(capture, rounds=self.rounds, limit=self.limit, who=self.name)
        return [self._invert(capture, observation, rng) for observation in seen]

    def _invert(self, capture: Capture, seen: Observation, rng: torch.Generator) -> Reconstruction:
        require_sgd(seen, who=self.name)
        where = f"{self.name}: round {seen.round}, node {seen.node}"
        if seen.local is not None and (seen.local.steps or seen.examples):
            steps, classes = batches(seen.local, examples=seen.examples), len(capture.task.classes)
            if len(steps) > 1 or len(steps[0]) >= classes:
                raise FlprivError(
                    f"{where}: {len(steps)} local steps on {1 + max(map(max, steps))} images of {classes} classes; this attack "
                    "takes one step on fewer images than classes apart: set local.steps = 1 and a smaller local.batch_size"
                )
        return invert(capture, seen, rng=rng, iterations=self.iterations, restarts=self.restarts)


def obstacle(task: Task) -> str | None:
    """What keeps a model from being peeled."""
    model = task.build().eval()
    net = network(task.build().eval(), task.shape, images=2)
    if net is None:
        return f"the operations of the model, a {type(model).__name__}, cannot be traced"
    last = net.nodes[-1].args[0]
    layer = net.module(last) if isinstance(last, Node) else None
    if not isinstance(layer, nn.Linear) or layer.bias is None:
        return "the last layer is not dense with a bias"
    images = torch.rand((2, *task.shape), generator=torch.Generator().manual_seed(0))
    graph = net.graph((images.double() - task.mean) / task.std).float()
    return None if torch.allclose(graph, model(images), rtol=1e-3, atol=1e-4) else "the model does more than its operations tell"


def invert(capture: Capture, seen: Observation, *, rng: torch.Generator, iterations: int, restarts: int) -> Reconstruction:
    """The images behind one step; perhaps none."""
    task = capture.task
    evidence = gather(
        capture, seen, rng=rng, device=torch.device("cpu"), max_steps=1, max_images=len(task.classes), who="layer-peeling"
    )
    model, labels = task.build().eval(), evidence.labels
    model.load_state_dict(dict(seen.sent))
    batched = evidence.site.model.training and any(isinstance(module, _BatchNorm) for module in model.modules())
    net = network(model, task.shape, images=len(labels)) if not batched else None
    moved = {name: value / evidence.site.recipe.lr for name, value in descent(seen, evidence.site.start).items()}
    inside = peel(net, moved, labels) if net is not None else {}
    if net is not None and not inside and seen.labels is None:
        labels = _lowest(moved, classes=len(task.classes), like=labels)
        inside = peel(net, moved, labels)
    images = torch.zeros((0, *task.shape))
    if net is not None and (enough := _telling(inside, prod(task.shape))) is not None:
        images = _images(net, *enough, task, rng=rng, iterations=iterations, restarts=restarts)
    found = len(images) > 0
    return Reconstruction(
        images=images,
        round=seen.round,
        node=seen.node,
        labels=labels[: len(images)],
        objective=cosine(evidence.site(images, labels), evidence.target) if found else None,
        method="exact: layer by layer",
        sensitivity=sensitivity(evidence, capture, rng=rng) if found else None,
    )


def _lowest(moved: Mapping[str, Tensor], *, classes: int, like: Tensor) -> Tensor:
    """The classes whose biases rise most, one for each image: the labels where no two are alike, at any scale of the update."""
    biases = [value for value in moved.values() if value.shape == (classes,)]
    return biases[-1].topk(len(like), largest=False).indices.sort().values if biases else like


def _telling(inside: Mapping[Node, Inside], pixels: int) -> tuple[Node, Tensor] | None:
    """The first operation told as well as others, and what it puts out, ``(N, *shape)``: the images themselves, or no fewer
    numbers other than zero than an image has pixels.
    """
    usual = median([one.error for one in inside.values()]) if inside else 0.0
    for node, one in inside.items():
        if one.error <= 10 * usual:
            values = one.value.float()
            told = (values.abs() > 1e-4 * values.abs().amax()).flatten(1).sum(1)
            return (node, values) if node.op == "placeholder" or int(told.min()) >= pixels else None
    return None


def _images(
    net: Network, node: Node, features: Tensor, task: Task, *, rng: torch.Generator, iterations: int, restarts: int
) -> Tensor:
    """The images ``(N, C, *spatial)`` that have ``features`` ``(N, *shape)`` at an operation.

    First as the network is; where that stops early, with ReLUs rounded off, less and less (:mod:`.smoothing`), in units of what
    they put out.
    """
    if node.op == "placeholder":
        return (features * task.std + task.mean).clamp(0, 1)
    size, unit = features.square().flatten(1).sum(1), float(features.square().mean().sqrt())
    part = _up_to(net, node).float()

    def search(images: Tensor, rows: Tensor, sharpness: float, patience: int) -> tuple[Tensor, Tensor]:
        rounded = smoothed(part, sharpness / unit)

        def evaluate(trials: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor]:
            trials = trials.detach().requires_grad_()
            apart = rounded((trials - task.mean) / task.std) - features[rows[chosen]]
            values = apart.square().flatten(1).sum(1) / size[rows[chosen]]
            return values.detach(), torch.autograd.grad(values.sum(), trials)[0]

        optimiser, share = LBFGS(patience=patience, enough=_ENOUGH), 8 if math.isfinite(sharpness) else 2
        found = optimiser.minimise(evaluate, images, iterations=max(1, iterations // share), rng=rng, what="layer-peeling")
        return found.trials, found.objective

    best = torch.zeros((net.images, *task.shape))
    value = torch.full((net.images,), torch.inf)
    for stages, patience in (((torch.inf,), 20), *[(_SHARPNESS, 60)] * (1 + restarts)):
        rows = (value > _FOUND).nonzero()[:, 0]
        if not len(rows):
            break
        images = start.grey((len(rows), *task.shape), rng)
        for sharpness in stages:
            images, objective = search(images, rows, sharpness, patience)
        wins = objective < value[rows]
        best[rows[wins]], value[rows[wins]] = images[wins], objective[wins]
    return best


def _up_to(net: Network, node: Node) -> nn.Module:
    """The part of a network that ends with an operation."""
    graph = Graph()
    copies: dict[Node, Node] = {}
    graph.graph_copy(net.graph.graph, copies)
    graph.output(copies[node])
    part = GraphModule(net.graph, graph)
    part.graph.eliminate_dead_code()
    part.delete_all_unused_submodules()
    part.recompile()
    return part
