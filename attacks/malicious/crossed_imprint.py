"""Crossed imprint: images sorted along several directions at once; what shares a bin in one is told apart by the others."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from flpriv.attack import Attack, Trap
from flpriv.attacks.malicious import behind
from flpriv.attacks.malicious.crossed_readout import CrossedLayer, mixed_directions
from flpriv.attacks.malicious.deeper import shown
from flpriv.attacks.malicious.imprint import quantile_edges, smooth_noise
from flpriv.attacks.malicious.insertion import host, insert, prefix, received
from flpriv.capture import Capture, Observation
from flpriv.claim import Goal, Reconstruction
from flpriv.errors import FlprivError
from flpriv.progress import track
from flpriv.records import Records
from flpriv.state import State
from flpriv.task import Task
from flpriv.threat import Can


class Block(nn.Module):
    """``(N, *shape)`` to the same shape: adds to every pixel the mean of neurons each of which answers to one bin alone.

    A neuron's answer rises from 0 to ``gain`` over its bin and stays there, so that its gradient is that of the images in the
    bin. What sorts images does not learn; the weights that do start at zero, so that an update keeps all its digits and
    more local steps hardly move images from bin to bin. Images that lie outside a window along one more direction are not
    answered to at all.

    Args:
        shape: of one image.
        directions: number of directions.
        bins: of each direction.
        clients: further neurons, one a client.
        gain: highest answer of a neuron, > 0.
        strength: highest brightness added to an image.
    """

    def __init__(self, shape: Sequence[int], *, directions: int, bins: int, clients: int, gain: float, strength: float) -> None:
        super().__init__()
        neurons = directions * bins + clients
        self.bins = nn.Linear(math.prod(shape), neurons)
        self.towards = _fixed(torch.zeros(directions, math.prod(shape)))
        self.gate = _fixed(torch.zeros(math.prod(shape)))
        self.window = _fixed(torch.tensor([-_FAR, _FAR]))
        self.lower, self.upper = _fixed(torch.zeros(neurons)), _fixed(torch.ones(neurons))
        self._along = [*torch.arange(directions).repeat_interleave(bins).tolist(), *[0] * clients]
        self._gain, self._strength = gain, strength

    def forward(self, images: Tensor) -> Tensor:
        """Images as the next layer sees them."""
        flat = images.flatten(1)
        place = (flat @ self.towards.T)[:, self._along]
        sorted_in = self._gain * (place - self.lower) / (self.upper - self.lower)
        past = flat @ self.gate
        outside = (self.window[0] - past).relu() + (past - self.window[1]).relu()
        sorted_in = sorted_in - _SHUT * self._gain * outside[:, None]
        answer: Tensor = (sorted_in + self.bins(flat)).clamp(0, self._gain).mean(1) * (self._strength / self._gain)
        return images + answer.view(-1, *[1] * (images.dim() - 1))


def _fixed(value: Tensor) -> nn.Parameter:
    """A parameter that does not learn: private training refuses modules with buffers of their own."""
    return nn.Parameter(value, requires_grad=False)


@dataclass(frozen=True, kw_only=True)
class CrossedTrap(Trap):
    """Sends the honest model with a filled block before it, or before a layer of it.

    Args:
        attack: whose trap it is.
        task: what the federation learns.
        images: ``(N, *shape)`` like those of the sites.
        seed: of the edges.
        filled: the block's entries by round; deeper in the model they depend on the layers before it.
    """

    attack: CrossedImprint
    task: Task
    images: Tensor
    seed: int
    filled: dict[int, State] = field(default_factory=dict)

    def arm(self, honest: State, *, round: int, node: int, nodes: Sequence[int]) -> State | None:
        """The honest state with the block's entries after it; where clients are told apart, each answers in a neuron of its own.

        Raises:
            FlprivError: for more nodes than clients can be told apart.
        """
        clients = self.attack.clients
        if self.attack.rounds and round not in self.attack.rounds:
            return None
        if clients and len(nodes) > clients:
            raise FlprivError(f"crossed-imprint: {len(nodes)} nodes, clients = {clients} tells too few apart")
        when = round if self.attack.before or self.attack.share < 1 else 0
        if when not in self.filled:
            self.filled[when] = self._fill(honest, round)
        entries = dict(self.filled[when])
        if clients:
            for edge, value in (("lower", -_FAR), ("upper", _FAR)):
                key = next(key for key in entries if key.endswith(f".{edge}"))
                entries[key] = entries[key].clone()
                entries[key][len(entries[key]) - clients + list(nodes).index(node)] = value
        return {**honest, **entries}

    def _fill(self, honest: State, round: int) -> State:
        """Directions along which what reaches the block differs much, edges where it is equally likely between.

        Where a share is caught, rounds take turns among the windows along one more direction.
        """
        attack, rng, model = self.attack, torch.Generator().manual_seed(self.seed), self.task.build().eval()
        seen = self.images
        if attack.before:
            model.load_state_dict(dict(honest))
            with torch.inference_mode():
                seen = received(model, seen, attack.before)
        *towards, gate = mixed_directions(seen, count=attack.directions + 1, rng=rng)
        seen, window = self._caught(seen.flatten(1), gate, round)
        per = attack.bins // attack.directions
        lower, upper = [], []
        for along in (seen @ torch.stack(towards).T).double().T:
            edges = quantile_edges(along, bins=per, rng=rng)
            edges[0] -= _WIDE * along.std()
            lower.append(edges)
            upper.append(torch.cat([edges[1:], torch.maximum(edges[-1:], along.max()) + _WIDE * along.std()]))
        aside = torch.full((attack.clients,), _FAR, dtype=torch.float64)
        place = f"{host(model, attack.before)}.crossed".lstrip(".")
        neurons = attack.directions * per + attack.clients
        return {
            f"{place}.towards": torch.stack(towards),
            f"{place}.gate": gate,
            f"{place}.window": window,
            f"{place}.lower": torch.cat([*lower, aside]).float(),
            f"{place}.upper": torch.cat([*upper, 2 * aside]).float(),
            f"{place}.bins.weight": torch.zeros(neurons, seen.shape[1]),
            f"{place}.bins.bias": torch.zeros(neurons),
        }

    def _caught(self, seen: Tensor, gate: Tensor, round: int) -> tuple[Tensor, Tensor]:
        """Those of ``seen`` ``(N, P)`` that the round catches, and its window ``(2,)`` along ``gate``."""
        windows = math.ceil(1 / self.attack.share)
        turn = (self.attack.rounds.index(round) if self.attack.rounds else round - 1) % windows
        past = seen @ gate
        low = torch.quantile(past, turn * self.attack.share) if turn else past.new_tensor(-_FAR)
        high = torch.quantile(past, (turn + 1) * self.attack.share) if turn + 1 < windows else past.new_tensor(_FAR)
        inside = (past >= low) & (past <= high)
        return seen[inside] if int(inside.sum()) > 4 else seen, torch.stack([low, high])


_SHUT = 1e6
"""How fast a neuron's answer falls outside the window."""
_WIDE = 100.0
"""How far the outermost bins reach, in standard deviations: images may be unlike the public ones."""
_FAR = 1e4
"""No image lies as far along any direction, measured in standard deviations."""


@dataclass(frozen=True, kw_only=True)
class CrossedImprint(Attack):
    """Sends a block that sorts images into bins along several directions, and takes even shared bins apart, in sums too.

    Every image falls into one bin of each direction. Which bins hold the same image is told by linear algebra, and images come
    back to the last digits, from one site or a sum over many, from one local step of SGD or several. The published imprint (one
    direction) loses every image that shares its bin. Directions are mixtures of the principal components of public images, or of
    smooth random images where none are granted. Where noise hides which bins belong together, each bin is read by itself; and
    images must be linearly independent, as those of patients are.

    Args:
        bins: number of neurons in all, ≥ 3; images up to half that number are told apart, beyond it ever fewer.
        directions: 1 to 3; three bear the fullest bins.
        clients: with this many neurons more, images in a sum are attributed to as many clients, each of which gets a model of its
            own; 0 leaves them together.
        strength: highest brightness that the block adds to an image, > 0; what the model sees of the block.
        gain: scale of the neurons, > 0; smaller ones make larger updates, larger ones bear more and longer local steps.
        rounds: when the block is sent; none named means every round.
        share: of the images that are sorted at all, in (0, 1]; where there are too many for the neurons, each round catches as
            many more of them.
        before: name of the layer the block is put before, empty for the whole model. Deeper, what the layer receives comes back,
            and images that give it are searched for; batch statistics before it must not be those of the batch.
        iterations: evaluations of that search for each image, at most.
    """

    name: ClassVar[str] = "crossed-imprint"
    goal: ClassVar[Goal] = Goal.RECONSTRUCTION
    needs: ClassVar[Can] = Can.TAMPER | Can.SEE_MODELS
    paper: ClassVar[str] = (
        "after Fowl et al., Robbing the Fed, ICLR 2022 (arXiv 2110.13057); "
        "Schmidt, Multiple Emitter Location and Signal Parameter Estimation, IEEE Trans. Antennas Propag. 1986"
    )

    bins: Annotated[int, Field(ge=3)] = 512
    directions: Annotated[int, Field(ge=1, le=3)] = 3
    clients: Annotated[int, Field(ge=0)] = 0
    strength: Annotated[float, Field(gt=0)] = 0.1
    gain: Annotated[float, Field(gt=0)] = 1.0
    rounds: tuple[int, ...] = (1,)
    share: Annotated[float, Field(gt=0, le=1)] = 1.0
    before: str = ""
    iterations: Annotated[int, Field(ge=1)] = 500

    def architecture(self, model: nn.Module, task: Task) -> nn.Module:
        """``model`` with the block run on its input; the honest keys stay as they are."""
        shape = task.shape
        if self.before:
            shape = tuple(received(task.build().eval(), torch.zeros(1, *task.shape), self.before).shape[1:])
        block = Block(
            shape,
            directions=self.directions,
            bins=self.bins // self.directions,
            clients=self.clients,
            gain=self.gain,
            strength=self.strength,
        )
        return insert(model, block, name="crossed", before=self.before)

    def trap(self, task: Task, *, public: Records | None, rng: torch.Generator) -> CrossedTrap:
        """The block, filled by public images, or by smooth random ones, when it is sent."""
        granted = public is not None and len(public) > self.directions + 1
        images = public.images if public is not None and granted else smooth_noise(256, task.shape, rng=rng)
        return CrossedTrap(attack=self, task=task, images=images, seed=int(torch.randint(2**31, (1,), generator=rng)))

    def run(self, capture: Capture, *, rng: torch.Generator) -> Sequence[Reconstruction]:
        """Claims about each armed reply or sum: images with ``confidence``, the surest first; perhaps none at all.

        Raises:
            FlprivError: if no reply to the block was captured.
        """
        armed = [(o, place) for o in capture.observations if o.trap and (place := prefix(o.sent, "crossed")) is not None]
        if not armed:
            raise FlprivError(f"{self.name}: no reply to the block was captured; every site refused it, or none took part")
        return [claim for seen, place in track(armed, self.name) for claim in self._read(seen, place, capture.task, rng)]

    def _read(self, seen: Observation, place: str, task: Task, rng: torch.Generator) -> Iterator[Reconstruction]:
        clients = self.clients if seen.node is None else 0
        neurons = len(seen.returned[f"{place}.bins.bias"]) - (self.clients - clients)
        weight, bias, lower, upper = (
            seen.returned[f"{place}.bins.weight"][:neurons],
            seen.returned[f"{place}.bins.bias"][:neurons].double(),
            seen.sent[f"{place}.lower"][:neurons].double(),
            seen.sent[f"{place}.upper"][:neurons].double(),
        )
        towards = seen.sent[f"{place}.towards"]
        layer = CrossedLayer(weight=weight, bias=bias, towards=towards, lower=lower, upper=upper, clients=clients)
        found = layer.read(most=behind.images(seen), pixels=not self.before)
        images = found.images
        if self.before and len(images):
            images = shown(task, seen.sent, images, before=self.before, rng=rng, iterations=self.iterations)
        for column, node in enumerate(seen.nodes) if clients else [(0, seen.node)]:
            own = found.owner == column if clients else slice(None)
            yield Reconstruction(
                images=images[own].view(-1, *task.shape),
                round=seen.round,
                node=node,
                confidence=found.confidence[own],
                method=found.method,
            )
