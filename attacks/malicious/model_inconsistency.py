"""Model inconsistency: all nodes but one get a model without gradients, so that a sum over nodes is that one's update."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from flpriv.attack import Attack, Trap
from flpriv.attacks.inversion.first_layer import descent
from flpriv.attacks.inversion.labels.last_layer import names_of
from flpriv.attacks.malicious.fishing import features_of
from flpriv.attacks.malicious.isolated import invert
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State, is_parameter, parameters
from flpriv.task import Task
from flpriv.threat import Can

_OFF = -150.0
"""A bias at which sigmoid and softplus are zero in float32. In a sum, it rounds the target's own bias off more than others."""


@dataclass(frozen=True, kw_only=True)
class SilenceTrap(Trap):
    """Sends one node the honest model, with a constant feature where there is a place for one, and the others zeros.

    Args:
        target: place of the node in the order in which nodes are addressed.
        constant: what makes one feature of the last layer constant, see :func:`constant_feature`.
        off: layer that is switched off by its bias, where zeros alone do not, see :func:`switch`.
        rounds: in which it is sent; none named means all.
    """

    target: int
    constant: Mapping[str, float]
    off: str
    rounds: tuple[int, ...]
    _zeros: dict[str, Tensor] = field(init=False, repr=False, compare=False, default_factory=dict)

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The state for the target, or for a node to be silenced.

        Raises:
            FlprivError: if there are too few nodes.
        """
        if self.rounds and round not in self.rounds:
            return None
        if self.target >= len(nodes):
            raise FlprivError(
                f"model-inconsistency: target = {self.target}: {len(nodes)} nodes are addressed in round {round}, counted from 0"
            )
        return self.to_target(honest) if node == nodes[self.target] else self.silence(honest)

    def to_target(self, honest: State) -> State:
        """The honest state with the constant feature."""
        sent = dict(honest)
        for layer, level in self.constant.items():
            for name, first in ((f"{layer}.weight", 0.0), (f"{layer}.bias", level)):
                sent[name] = sent[name].clone()
                sent[name][0] = first
        return sent

    def silence(self, honest: State) -> State:
        """The honest state with zeros for parameters, and one bias that switches a layer off."""
        for name, value in honest.items():
            if is_parameter(name, value) and name not in self._zeros:
                self._zeros[name] = torch.full_like(value, _OFF if self.off and name == f"{self.off}.bias" else 0.0)
        return {**honest, **self._zeros}

    def disarm(self, returned: State, *, sent: State, honest: State) -> State:
        """The honest model as it was: zeros are no place to train from."""
        return honest


@dataclass(frozen=True, kw_only=True)
class ModelInconsistency(Attack):
    """Sends all nodes but one a model of zeros, takes the sum for the update of the one, and inverts it.

    Where every parameter is zero, no gradient reaches a layer below the last one, and none the last one's weights if its features
    are zero too, for any number of local steps; before a sigmoid or softplus a large negative bias makes them so. What those
    parameters send in a sum is therefore the target's update times its share of the sum. The bias of the last layer always has a
    gradient, which the sum mixes; but where one feature of the target's model can be made constant, its weights have the gradient
    of the bias (:func:`constant_feature`), exactly for one local step. Dense, convolutional and residual networks are isolated
    whole, with batch normalisation in either mode; which parameters are not is found by training the silenced model on noise,
    and they are left out of the update. Shares are taken to be equal, which leaves the direction of an update of sites that
    differ in size; a single reply of the target is read as it is. The isolated update goes to an attack on single updates.

    Args:
        target: place of the node, in the order in which nodes are addressed, ≥ 0.
        then: name of the attack that inverts the isolated update.
        then_options: of that attack.
        rounds: when the trap is sent and read; none named means every round.
    """

    name: ClassVar[str] = "model-inconsistency"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS | Can.KNOW_LOCAL
    paper: ClassVar[str] = "Pasquini et al. 2022, https://arxiv.org/abs/2111.07380"

    target: Annotated[int, Field(ge=0)] = 0
    then: str = "tuned-matching"
    then_options: Mapping[str, Any] = field(default_factory=dict)
    rounds: tuple[int, ...] = (1,)

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> SilenceTrap:
        """Zeros, and for the target a constant feature if the model has a place for one."""
        return SilenceTrap(target=self.target, constant=constant_feature(task), off=switch(task), rounds=self.rounds)

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """What ``then`` claims of the target's update in each armed round.

        Raises:
            FlprivError: if no reply to the trap was captured, or ``then`` cannot invert what is isolated.
        """
        seen = [one for one in capture.observations if one.trap and one.node in (None, *one.nodes[self.target : self.target + 1])]
        if not seen:
            raise FlprivError(
                f"{self.name}: nothing of the target, place {self.target}, was captured; it refused the model or took no part"
            )
        claims = []
        for one in track(seen, self.name):
            alone = self.isolate(capture, one)
            claims += invert(capture, alone, then=self.then, options=self.then_options, rng=rng, who=self.name)
        return claims

    def isolate(self, capture: Capture, seen: Observation) -> Observation:
        """The target's reply as told by a sum; parameters that are not isolated are those sent. A single reply stays as it is.

        Raises:
            FlprivError: if the model behind a sum is not known.
        """
        if seen.node is not None:
            return replace(seen, trap="")
        if len(capture.models) < seen.round:
            raise FlprivError(
                f"{self.name}: round {seen.round}: the capture lacks the global model before it; grant 'see-models'"
            )
        nodes, task = len(seen.nodes), capture.task
        trap = SilenceTrap(target=self.target, constant=constant_feature(task), off=switch(task), rounds=())
        honest = capture.models[seen.round - 1]
        sent, rest = trap.to_target(honest), trap.silence(honest)
        weight, bias = names_of(parameters(sent), classes=len(task.classes))
        steps = seen.local.steps if seen.local is not None and seen.local.steps else 2
        told = list(silent(task, rest, steps=min(steps, 3)))
        decay = descent(replace(seen, sent=rest, returned=rest), told)
        moved = {
            name: nodes * (seen.returned[name].double() - seen.sent[name].double()) - (nodes - 1) * decay[name] for name in told
        }
        if bias is not None and weight in moved and (channel := _constant(task, sent)) is not None:
            feature, value = channel
            pull = 0.0 if seen.local is None else seen.local.lr * seen.local.weight_decay
            moved[bias] = (moved[weight][:, feature] + pull * sent[weight][:, feature]) / value - pull * sent[bias]
        returned = {name: (sent[name].double() + value).to(sent[name].dtype) for name, value in moved.items()}
        return replace(
            seen,
            node=seen.nodes[self.target],
            sent=sent,
            returned={**sent, **returned},
            examples=None if seen.examples is None else max(1, round(seen.examples / nodes)),
            labels=None,
            defenses=(),
            trap="",
        )


def silent(task: Task, state: State, *, steps: int) -> Iterator[str]:
    """The names of parameters that do not move in so many local steps from ``state``, tried on noise."""
    model = task.build().train()
    model.load_state_dict(dict(state))
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimiser, rng = torch.optim.SGD(model.parameters(), lr=0.1), torch.Generator().manual_seed(0)
    for _ in range(steps):
        images = torch.rand((4, *task.shape), generator=rng)
        optimiser.zero_grad()
        torch.autograd.backward(cross_entropy(model(images), torch.randint(len(task.classes), (4,), generator=rng)))
        optimiser.step()
    yield from (name for name, value in model.named_parameters() if torch.equal(value, before[name]))


def constant_feature(task: Task) -> dict[str, float]:
    """What makes a feature of the last layer the same for all images: layers whose first row is to be zero, and its bias.

    Tried on noise: the layer before the last by itself, then with others as wide before it, for sums such as at the end of a
    residual block. Empty where neither does.
    """
    state, layers = task.build().state_dict(), _biased(task)
    names = list(layers)
    wide = [name for name in names[1:6] if layers[name] == layers[names[0]]]
    for others in ([], wide) if names else ():
        constant = {names[0]: 1.0, **dict.fromkeys(others, 0.0)}
        if _constant(task, SilenceTrap(target=0, constant=constant, off="", rounds=()).to_target(state)) is not None:
            return constant
    return {}


def switch(task: Task) -> str:
    """The layer before the last, where its activation is zero for large negative inputs but not for zero (sigmoid, softplus)."""
    for off in ("", *list(_biased(task))[:1]):
        still = SilenceTrap(target=0, constant={}, off=off, rounds=()).silence(task.build().state_dict())
        if not bool(features_of(task, still, torch.rand((2, *task.shape), generator=torch.Generator().manual_seed(0))).any()):
            return off
    return ""


def _biased(task: Task) -> dict[str, int]:
    """The layers with a bias and their rows, from the last one up, the last dense layer left out."""
    model = task.build()
    dense = (names_of(parameters(model.state_dict()), classes=len(task.classes))[0] or "").rpartition(".")[0]
    biases = {name: part.bias for name, part in model.named_modules() if name != dense and hasattr(part, "bias")}
    return {name: len(bias) for name, bias in reversed(biases.items()) if isinstance(bias, nn.Parameter)}


def _constant(task: Task, state: State) -> tuple[int, float] | None:
    """A feature of the last layer that is the same for all images and not zero, and its value."""
    images = torch.rand((4, *task.shape), generator=torch.Generator().manual_seed(0))
    features = features_of(task, state, images)
    same = ((features - features[:1]).abs().amax(0) == 0) & (features[0].abs() > 1e-3)
    if not bool(same.any()):
        return None
    place = int(same.nonzero()[0])
    return place, float(features[0, place])
