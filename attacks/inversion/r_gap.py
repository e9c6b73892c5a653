"""R-GAP: one image out of one gradient, layer by layer from the last to the first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.func import jvp
from torch.nn.functional import cross_entropy

from flpriv.attack import Attack
from flpriv.attacks.inversion.evidence import honest
from flpriv.attacks.inversion.first_layer import descent, require_sgd
from flpriv.attacks.inversion.inverses import INVERSES
from flpriv.attacks.inversion.linear_layer import as_images, read
from flpriv.attacks.inversion.linear_systems import Equations, solve
from flpriv.attacks.inversion.unroll import batches
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.task import Task
from flpriv.threat import Can


@dataclass(frozen=True, kw_only=True)
class RGap(Attack):
    """Solves a linear system for the input of each layer, from the last to the first: one image, exactly where ranks suffice.

    What a layer put out and the gradient of its weights are both linear in what it took in. Applies to ``nn.Sequential`` models
    of dense layers, convolutions, ``nn.Flatten`` and activations that can be inverted (leaky ReLU, ELU, softplus, sigmoid, tanh;
    ReLU tells only its positive outputs), the last layer dense with a bias; to one step of SGD on one image. Each convolution
    needs at least as many outputs and weights as inputs.

    Args:
        unknowns: refuse models with a convolution of more inputs than this; memory grows with its square, time with its cube.
        rounds: which rounds to attack; none named means all.
        limit: attack no more than this many updates, in the order captured.
    """

    name: ClassVar[str] = "r-gap"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.SEE_UPDATES
    paper: ClassVar[str] = "Zhu and Blaschko 2021, https://arxiv.org/abs/2010.07733"

    unknowns: Annotated[int, Field(ge=1)] = 4096
    rounds: tuple[int, ...] = (1,)
    limit: Annotated[int, Field(ge=1)] | None = None

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """One claim for each update: an image, its label, and how far its own gradient is from the update as ``objective``.

        Raises:
            FlprivError: for a model it does not apply to, if there is no honest update in ``rounds``, or if an update is not one
                step of SGD on one image.
        """
        stages = stages_of(capture.task, unknowns=self.unknowns, who=self.name)
        seen = honest(capture, rounds=self.rounds, limit=self.limit, who=self.name)
        return [self._invert(capture.task, observation, stages) for observation in track(seen, self.name)]

    def _invert(self, task: Task, seen: Observation, stages: Sequence[Stage]) -> Reconstruction:
        require_sgd(seen, who=self.name)
        if seen.local is not None and (seen.local.steps or seen.examples):
            steps = batches(seen.local, examples=seen.examples)
            if steps != ((0,),):
                raise FlprivError(
                    f"{self.name}: round {seen.round}, node {seen.node}: {len(steps)} local steps on {1 + max(map(max, steps))} "
                    "images; this attack reads one image from one step: set local.batch_size = 1 and local.steps = 1"
                )
        return invert(task, seen, stages)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One layer of a sequence.

    Args:
        name: of the module.
        module: the layer.
        shape: of what it takes in, for one image.
    """

    name: str
    module: nn.Module
    shape: tuple[int, ...]


def stages_of(task: Task, *, unknowns: int, who: str) -> tuple[Stage, ...]:
    """The layers of the task's model in order.

    Raises:
        FlprivError: naming the first layer that R-GAP cannot go through, and why.
    """
    model = task.build().eval()
    if not isinstance(model, nn.Sequential):
        raise FlprivError(f"{who}: the model is a {type(model).__name__}; R-GAP goes through an nn.Sequential, layer by layer")
    stages, inside = [], torch.zeros((1, *task.shape))
    for name, module in _flat(model):
        stages.append(Stage(name=name, module=module, shape=tuple(inside.shape[1:])))
        inside = module(inside)
    last = stages[-1].module
    if not isinstance(last, nn.Linear) or last.bias is None:
        raise FlprivError(f"{who}: the last layer, {stages[-1].name!r}, is not dense with a bias; R-GAP starts from its gradient")
    for stage, above in zip(stages, [*stages[1:], None], strict=True):
        if (wrong := _obstacle(stage, above, unknowns)) is not None:
            raise FlprivError(f"{who}: layer {stage.name!r} {wrong}")
    return tuple(stages)


def _flat(model: nn.Sequential, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    for name, module in model.named_children():
        if isinstance(module, nn.Sequential):
            yield from _flat(module, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", module


def _obstacle(stage: Stage, above: Stage | None, unknowns: int) -> str | None:
    """What keeps R-GAP from going through a layer."""
    module, inputs = stage.module, prod(stage.shape)
    if isinstance(module, nn.Linear) and len(stage.shape) > 1:
        return "is dense along one axis alone; put nn.Flatten before it"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if inputs > unknowns:
            return f"has {inputs} inputs to solve for, more than unknowns = {unknowns}; raise it, or take smaller images"
        outputs = prod(above.shape) if above is not None else 0
        told = outputs // 2 if above is not None and isinstance(above.module, nn.ReLU) else outputs
        if told + module.weight.numel() < inputs:
            return f"has {inputs} inputs, which {told} outputs and {module.weight.numel()} weights cannot tell; R-GAP ends there"
        return None
    if isinstance(module, (nn.Linear, nn.Flatten, nn.Identity, nn.Dropout, *INVERSES)):
        return None
    return f"is a {type(module).__name__}, which R-GAP cannot invert"


def invert(task: Task, seen: Observation, stages: Sequence[Stage]) -> Reconstruction:
    """The image behind one step on one image; none where the update is zero or leaves some layer's inputs open."""
    moved = descent(seen, [key for key, _ in task.build().named_parameters()])
    pixels = _recurse(stages, {key: seen.sent[key].double() for key in moved}, moved)
    label = int(moved[f"{stages[-1].name}.bias"].argmin())
    found = pixels is not None and bool(pixels.isfinite().all())
    images = as_images(pixels.view(1, -1), task) if pixels is not None and found else torch.zeros((0, *task.shape))
    return Reconstruction(
        images=images,
        round=seen.round,
        node=seen.node,
        labels=torch.full((len(images),), label),
        objective=torch.tensor([_apart(task, seen, images, label, moved)] if found else [], dtype=torch.float64),
        method="exact: R-GAP",
    )


def _recurse(stages: Sequence[Stage], sent: Mapping[str, Tensor], moved: Mapping[str, Tensor]) -> Tensor | None:
    """What the first stage took in, from the last one's gradient."""
    slopes = moved[f"{stages[-1].name}.bias"]
    outputs, trust = torch.zeros_like(slopes), torch.zeros_like(slopes)
    for stage in reversed(stages):
        module, weight = stage.module, f"{stage.name}.weight"
        if isinstance(module, nn.Linear):
            slopes = moved.get(f"{stage.name}.bias", slopes)
            outputs, told = read(moved[weight], slopes)
            if told <= 0:
                return None
            slopes = sent[weight].T @ slopes
            trust = torch.ones_like(outputs)
        elif weight in moved:
            bias = sent.get(f"{stage.name}.bias")
            outputs = outputs if bias is None else outputs - bias.view(-1, *[1] * (outputs.dim() - 1))
            equations = Equations(
                layer=module,
                weight=sent[weight],
                shape=stage.shape,
                outputs=outputs,
                trust=trust,
                slopes=slopes,
                moved=moved[weight],
            )
            solved = solve(equations)
            if solved is None:
                return None
            outputs, slopes, trust = solved, equations.back(slopes, sent[weight]), torch.ones(stage.shape, dtype=torch.float64)
        elif type(module) in INVERSES:
            outputs, known = INVERSES[type(module)](module, outputs)
            steep = jvp(partial(_apply, module), (outputs,), (torch.ones_like(outputs),))[1]
            slopes, trust = steep * slopes, steep * known
        else:
            outputs, slopes, trust = (value.view(stage.shape) for value in (outputs, slopes, trust))
    return outputs


def _apply(layer: nn.Module, inputs: Tensor) -> Tensor:
    out: Tensor = layer(inputs.clone())
    return out


def _apart(task: Task, seen: Observation, images: Tensor, label: int, moved: Mapping[str, Tensor]) -> float:
    """How far the direction of the image's own gradient is from the update: the sine of the angle, in [0, 1]."""
    model = task.build().eval()
    model.load_state_dict(dict(seen.sent))
    loss = cross_entropy(model(images), torch.tensor([label]))
    own = torch.cat([slope.double().flatten() for slope in torch.autograd.grad(loss, list(model.parameters()))])
    observed = torch.cat([value.flatten() for value in moved.values()])
    own, observed = own / own.norm().clamp_min(1e-300), observed / observed.norm().clamp_min(1e-300)
    return float((observed - (own @ observed) * own).norm())
