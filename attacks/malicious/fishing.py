"""Fishing: a last layer that silences all images of a large batch but a few, whose update is then inverted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Annotated, Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.attacks.inversion.labels.last_layer import names_of
from flpriv.attacks.malicious.imprint import smooth_noise
from flpriv.attacks.malicious.isolated import invert
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State, parameters
from flpriv.task import Task
from flpriv.threat import Can

Strategy = Literal["class", "feature"]
_SURE, _ROUNDED, _RATE = 120.0, 0.1, 1000.0
"""Distance of logits that leaves nothing of the smaller one; how far a count of images may be from a whole number; a learning
rate at which weights round off little of an update."""


@dataclass(frozen=True, kw_only=True)
class HeadTrap(Trap):
    """Sends the honest model with another last layer: one row that looks at the features, the same for every node.

    Args:
        task: whose model it is.
        strategy: see :class:`Fishing`.
        target: the class of the row.
        feature: the only feature the row looks at; ``None`` for all alike.
        sharpness: of the cut, in standard deviations of what the row sees.
        crowd: images expected behind an update.
        rounds: in which it is sent, in order.
        images: like those of the sites, to see how their features lie; ``(N, *shape)``.
    """

    task: Task
    strategy: Strategy
    target: int
    feature: int | None
    sharpness: float
    crowd: int
    rounds: tuple[int, ...]
    images: Tensor
    _made: dict[int, State] = field(init=False, repr=False, compare=False, default_factory=dict)

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state with the last layer replaced."""
        if round not in self.rounds:
            return None
        if round not in self._made:
            self._made[round] = self._head(honest, self.rounds.index(round))
        return {**honest, **self._made[round]}

    def disarm(self, returned: State, *, sent: State, honest: State) -> State:
        """The honest model as it was: a magnified update would ruin it, and later rounds need the same."""
        return honest

    def _head(self, honest: State, place: int) -> State:
        weight, bias = last_layer(honest, self.task)
        features = features_of(self.task, honest, self.images)
        row = torch.zeros(features.shape[1])
        row[slice(None) if self.feature is None else self.feature] = 1.0
        if self.strategy == "class":
            row, least = 0.5 * row, 0.0
            others = _SURE + 2 * float((features @ row).abs().max())
        else:
            along = features @ row
            row, along = row * (self.sharpness / along.std().clamp_min(1e-6)), along / along.std().clamp_min(1e-6)
            others, least = 0.0, -self.sharpness * self._cut(along.double(), place)
        weights, biases = torch.zeros_like(honest[weight]), torch.full_like(honest[bias], others)
        weights[self.target], biases[self.target] = row, least
        return {weight: weights, bias: biases}

    def _cut(self, along: Tensor, place: int) -> float:
        """Above which so many images of a crowd are expected: none in the first of several rounds, one more in each other."""
        above = place if len(self.rounds) > 1 else 1
        if not above:
            return float(along.max() + _SURE / self.sharpness + 10)
        return float(torch.quantile(along, max(0.0, 1 - above / self.crowd)))


@dataclass(frozen=True, kw_only=True)
class Fishing(Attack):
    """Sends a last layer under which only some images have a gradient, counts them by the bias, and inverts what they sent.

    Every row of the last layer but the target's is zero, so below it an image counts by ``p_target - [its label is the target]``
    alone. ``"class"`` makes every ``p_target`` zero: images of the target class remain, however many the others are.
    ``"feature"`` makes it 1 for images whose feature lies above a cut, 0 for those below: images of the class below and others
    above remain. Two rounds with two cuts differ by the images between both, of whatever class, provided that they use the same
    batch: a site's records, or those of all nodes in a sum. The first round's cut lies above all images; each further one lets
    one more of a crowd of images like public ones rise above, and where exactly one (``most``) did, it is inverted. A single
    round of ``"feature"`` is read as if nobody had the target class. For one local step of plain SGD; batch normalisation in
    train mode mixes images again, and sites that clip their updates hide the scale that images are counted by.

    Args:
        strategy: ``"class"`` or ``"feature"``.
        target: index of the target class; negative ones count from the end.
        feature: index of the feature that is cut; ``None`` for the mean of all, which lets the gradient show the whole image
            where features are local.
        sharpness: of the cut, in standard deviations of the feature, > 0: how close images may lie to it.
        crowd: images expected behind an update, or behind the sum of all nodes, ≥ 1: how high the cuts lie.
        most: invert what is left of so many images at most, ≥ 1.
        then: name of the attack that inverts it.
        then_options: of that attack.
        rounds: when the trap is sent; a cut for each.
    """

    name: ClassVar[str] = "fishing"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS | Can.KNOW_LOCAL
    paper: ClassVar[str] = "Wen et al. 2022, https://arxiv.org/abs/2202.00580"

    strategy: Strategy = "class"
    target: int = -1
    feature: Annotated[int, Field(ge=0)] | None = None
    sharpness: Annotated[float, Field(gt=0)] = 3000.0
    crowd: Annotated[int, Field(ge=1)] = 32
    most: Annotated[int, Field(ge=1)] = 4
    then: str = "tuned-matching"
    then_options: Mapping[str, Any] = field(default_factory=dict)
    rounds: Annotated[tuple[int, ...], Field(min_length=1)] = (1,)

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> HeadTrap:
        """The last layers to send, made once the honest model of a round is there."""
        images = public.images if public is not None and len(public) else smooth_noise(128, task.shape, rng=rng)
        return HeadTrap(
            task=task,
            strategy=self.strategy,
            target=self._target(task),
            feature=self.feature,
            sharpness=self.sharpness,
            crowd=self.crowd,
            rounds=tuple(sorted(self.rounds)),
            images=images[:256],
        )

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """What ``then`` claims of each isolated update; of a node (or sum) without any, a claim of no images.

        Raises:
            FlprivError: if no reply to the trap was captured, or sites do not train by one step of SGD on one and the same batch.
        """
        seen = [one for one in capture.observations if one.trap]
        if not seen:
            raise FlprivError(f"{self.name}: no reply to the trap was captured; every site refused it, or none took part")
        by_node = groupby(sorted(seen, key=lambda one: (one.node is None, one.node, one.round)), key=lambda one: one.node)
        claims = []
        for node, replies in track([(node, list(replies)) for node, replies in by_node], self.name):
            groups = list(self.isolate(replies, capture.task))
            for alone in groups:
                claims += invert(capture, alone, then=self.then, options=self.then_options, rng=rng, who=self.name)
            if not groups:
                nothing = torch.zeros((0, *capture.task.shape))
                claims.append(Reconstruction(images=nothing, round=replies[-1].round, node=node, method="nobody isolated"))
        return [claim if self.strategy == "class" else replace(claim, labels=None) for claim in claims]

    def isolate(self, replies: Sequence[Observation], task: Task) -> Iterator[Observation]:
        """The updates of ``most`` images or fewer that a node's replies tell, as if these images had been all.

        What other images leave in the last layer is put right: its rows follow from the target's.

        Raises:
            FlprivError: if sites do not train by one step of SGD, or ``"feature"`` rounds differ in more than the last layer.
        """
        target = self._target(task)
        earlier: dict[str, Tensor] | None = None
        for place, seen in enumerate(replies):
            batch = self._batch(seen, several=len(replies) > 1)
            slopes = gradient(seen)
            weight, bias = last_layer(seen.sent, task)
            if self.strategy == "feature" and place and not _same(seen.sent, replies[0].sent, (weight, bias)):
                raise FlprivError(
                    f"{self.name}: round {seen.round}: the model below the last layer is not that of round {replies[0].round}; "
                    "send the trap to all nodes and in rounds that follow each other"
                )
            if self.strategy == "class":
                told, label = slopes, target
            else:
                told = {key: value - earlier[key] for key, value in slopes.items()} if earlier is not None else slopes
                label = (target + 1) % len(task.classes)
                first, earlier = earlier is None and len(self.rounds) > 1, slopes
                if first:
                    continue
            if self.strategy == "feature":
                others = torch.arange(len(task.classes)) != target
                told[bias] = torch.where(others, told[bias], -told[bias][others].sum())
            count = batch * float(told[bias][target].abs())
            images = round(count)
            if 1 <= images <= self.most and abs(count - images) <= _ROUNDED * images:
                told = {key: value * batch / images for key, value in told.items()}
                yield _alone(seen, told, (weight, bias), target=target, images=images, label=label)

    def _target(self, task: Task) -> int:
        if not -len(task.classes) <= self.target < len(task.classes):
            raise FlprivError(f"{self.name}: target = {self.target}: the task has {len(task.classes)} classes, counted from 0")
        return self.target % len(task.classes)

    def _batch(self, seen: Observation, *, several: bool) -> float:
        """How many images an update is the mean of."""
        where = f"{self.name}: round {seen.round}, node {seen.node}"
        if seen.local is None:
            raise FlprivError(f"{where}: the capture lacks the local recipe")
        size, nodes = seen.local.batch_size, len(seen.nodes) if seen.node is None else 1
        each = (seen.examples or size * nodes) / nodes
        steps = seen.local.steps or seen.local.epochs * -(-each // size)
        if seen.local.optimizer != "sgd" or steps != 1:
            raise FlprivError(
                f"{where}: {steps:g} local steps by {seen.local.optimizer}; one step of SGD can be read: set local.steps = 1"
            )
        if several and self.strategy == "feature" and each > size:
            raise FlprivError(
                f"{where}: sites draw another {size} of {each:g} records in each round, and cuts can be compared on one batch "
                "alone; set local.batch_size to the records of a site, or strategy = 'class'"
            )
        return min(each, size) * nodes


def _alone(
    seen: Observation, told: Mapping[str, Tensor], names: tuple[str, str], *, target: int, images: int, label: int
) -> Observation:
    """The update of ``images`` images alone, as by a step from a model that gives them the same whatever they show.

    Args:
        seen: a reply.
        told: what they added to the mean gradient of ``images``.
        names: of the last layer's weight and bias.
        target: the only row of the last layer that is not zero.
        images: how many.
        label: of them: the target where its probability is zero, any other where it is 1.

    The row's scale is free, for it scales the gradients below alone: they are made as large as the last layer's.
    """
    weight, bias = names
    row, others = told[weight][target], torch.arange(len(told[bias])) != target
    share = torch.where(others, -1.0 / int(others.sum()) if label == target else 0.0, 1.0).double()
    share[label] = 1.0 if label == target else -1.0
    slopes = {**told, weight: share[:, None] * row, bias: share * told[bias][target]}
    below = sum(float(value.square().sum()) for key, value in told.items() if key not in names)
    scale = float(slopes[weight].norm()) / max(below**0.5, 1e-300)
    sent = {**seen.sent, weight: seen.sent[weight] * scale}
    reach = 4 * float((sent[weight][target].double() @ (row / told[bias][target])).abs())
    sent[bias] = torch.where(others == (label == target), 1.0, 0.0).to(seen.sent[bias].dtype) * (_SURE + reach)
    slopes = {key: value if key in names else scale * value for key, value in slopes.items()}
    assert seen.local is not None
    moved = {key: (sent[key].double() - _RATE * value).to(sent[key].dtype) for key, value in slopes.items()}
    return replace(
        seen,
        sent=sent,
        returned={**sent, **moved},
        examples=images,
        defenses=(),
        labels=torch.full((images,), label),
        local=replace(seen.local, lr=_RATE, batch_size=images, steps=1, momentum=0.0, weight_decay=0.0, loss="cross-entropy"),
    )


def last_layer(state: State, task: Task) -> tuple[str, str]:
    """The names of the weight and bias of the last dense layer.

    Raises:
        FlprivError: if it has no bias, or the model does not end in a dense layer.
    """
    weight, bias = names_of(parameters(state), classes=len(task.classes))
    if weight is None or bias is None:
        raise FlprivError("the model does not end in a dense layer with a bias; no image can be silenced by it")
    return weight, bias


def features_of(task: Task, state: State, images: Tensor) -> Tensor:
    """``(N, F)`` what the last dense layer of the model sees of ``images``, in eval mode."""
    model = task.build().eval()
    model.load_state_dict({key: state[key] for key in model.state_dict()})
    layer = model.get_submodule(last_layer(state, task)[0].rpartition(".")[0])
    kept: list[Tensor] = []

    def keep(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        kept.append(inputs[0])

    layer.register_forward_pre_hook(keep)
    with torch.no_grad():
        for part in torch.split(images, 64):
            model(part)
    return torch.cat(kept)


def gradient(seen: Observation) -> dict[str, Tensor]:
    """The mean gradient behind one step of SGD, float64; the pull of weight decay is taken out."""
    assert seen.local is not None
    kept = 1 - seen.local.lr * seen.local.weight_decay
    sent = parameters(seen.sent)
    return {key: (kept * value.double() - seen.returned[key].double()) / seen.local.lr for key, value in sent.items()}


def _same(one: State, other: State, apart: Sequence[str]) -> bool:
    return all(
        torch.allclose(value, other[key], rtol=1e-5, atol=1e-7) for key, value in parameters(one).items() if key not in apart
    )
