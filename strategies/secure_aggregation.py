"""The server's side of secure aggregation: training over Flower's SecAgg+, whose sum alone is what a strategy is given."""

from __future__ import annotations

import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MessageType, RecordDict
from flwr.common import bytes_to_ndarray
from flwr.common.constant import ErrorCode
from flwr.common.secure_aggregation.secaggplus_constants import Key, Stage
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid
from flwr.serverapp import strategy as flower
from flwr.serverapp.strategy import Strategy
from flwr.supercore.run import Run
from numpy.typing import NDArray

from flpriv.errors import RunError, ScenarioError
from flpriv.secure_aggregation import CONFIGS, MODULUS, Numbers, SecureAggregation, Unmask
from flpriv.strategies import masks
from flpriv.strategies.masks import Masked

LINEAR = tuple(cls.aggregate_train for cls in (flower.FedAvg, flower.FedAvgM, flower.FedAdam, flower.FedAdagrad, flower.FedYogi))
"""What a strategy may make of replies: their weighted mean, and anything that needs no more than that."""


def check_strategy(strategy: Strategy, name: str) -> None:
    """Raise unless ``strategy`` can do with the weighted mean of a round's replies.

    A class of one's own can where it inherits ``aggregate_train`` from FedAvg or a server-side optimiser, or says so by a class
    attribute ``takes_sums = True``.

    Raises:
        ScenarioError: naming the strategy.
    """
    if type(strategy).aggregate_train not in LINEAR and not getattr(strategy, "takes_sums", False):
        raise ScenarioError(
            f"federation.strategy: {name!r} looks at single replies, which secure aggregation hides; "
            "use FedAvg, FedProx, FedAvgM, FedAdam, FedAdagrad or FedYogi, or leave federation.secure_aggregation out"
        )
    if (key := getattr(strategy, "weighted_by_key", "num-examples")) != "num-examples":
        raise ScenarioError(
            f"federation.options: weighted_by_key = {key!r}: under secure aggregation replies are weighed by 'num-examples'"
        )


class Operator(Protocol):
    """Who runs the server, and may ask sites to unmask what they should not."""

    def announce(self, agreed: SecureAggregation) -> SecureAggregation:
        """The options that the nodes are told, which the round is run with."""

    def unmask(self, honest: Mapping[int, Unmask], *, threshold: int) -> Mapping[int, Unmask]:
        """What each node is asked in the last stage."""

    def opened(self, reply: Message, *, node: int) -> None:
        """Take the reply of a node whose masks came off, as it would be without secure aggregation."""

    def unanswered(self, reply: Message, *, node: int) -> None:
        """Take note of a node that gave its masked update and then answered the last request with an error."""


@dataclass(kw_only=True)
class _Round:
    """One run of the protocol; nodes are named by their pseudonyms.

    Args:
        asked: the strategy's message to each node, in order.
        numbers: announced to all.
        neighbours: with whom each node shares secrets, itself included.
        timeout: seconds to wait in each stage.
        keys: the two public keys of each node that sent them.
        sources: the nodes whose shares reached each node, itself not among them.
        replies: to the request for masked updates.
        vectors: the masked updates.
        errors: the reply of each node that answered with an error.
    """

    asked: Mapping[int, Message]
    numbers: Numbers
    neighbours: Mapping[int, Sequence[int]]
    timeout: float | None
    keys: dict[int, list[bytes]] = field(default_factory=dict)
    sources: dict[int, list[int]] = field(default_factory=dict)
    replies: dict[int, Message] = field(default_factory=dict)
    vectors: dict[int, Masked] = field(default_factory=dict)
    errors: dict[int, Error] = field(default_factory=dict)

    @property
    def size(self) -> int:
        """Entries of a masked vector."""
        _, record = _model(next(iter(self.asked.values())))
        return 1 + sum(value.numel() for value in record.to_torch_state_dict().values() if value.is_floating_point())

    def weight(self, node: int) -> int:
        """What must stand in front of a node's update: the number of its examples is known."""
        told = self.replies[node].content.metric_records["fitres.num_examples"]["num_examples"]
        return masks.weight(told, self.numbers) if isinstance(told, int) else 0

    def public(self, node: int, others: Iterable[int]) -> dict[int, bytes]:
        """The public keys that ``node`` masks with, of ``others``."""
        return {other: self.keys[other][0] for other in others if other in self.sources[node]}

    def need(self, left: Iterable[int], what: str) -> None:
        """Raise unless as many nodes are ``left`` around each that shared its secrets as it takes to have them."""
        nodes = set(left)
        if len(nodes) < 2 or any(
            len(nodes & set(self.neighbours[node])) < self.numbers.threshold for node in self.sources or nodes
        ):
            raise _Halted(
                f"{len(nodes)} of {len(self.asked)} nodes gave {what}, and {self.numbers.threshold} of each node's are needed"
            )


class _Halted(Exception):
    """The round ends without a sum."""


class SecureGrid(Grid):
    """A grid on which training messages are answered by way of SecAgg+: every reply carries the same, mean, update.

    As in Flower's own workflow the replies stand for the nodes that took part, with their metrics, which travel in the clear;
    the weighted mean of them is the mean of the updates. Evaluation and queries go through as they are. A node that answers with
    an error is left out, and where too few are left all are answered with an error that says so.

    Args:
        grid: the engine's own.
        options: of the protocol.
        operator: whoever may tamper with it; nobody does without.
        seed: of the ring in which nodes stand where each shares its secrets with some.
    """

    def __init__(self, grid: Grid, options: SecureAggregation, *, operator: Operator | None = None, seed: int = 0) -> None:
        self._grid, self._options, self._operator = grid, options, operator
        self._rng = random.Random(seed)

    @property
    def run(self) -> Run:
        """Run information."""
        return self._grid.run

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._grid.set_run(run)

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """The nodes."""
        return list(self._grid.get_node_ids())

    def get_nodes(self) -> list[NodeInfo]:
        """What is known of the nodes."""
        return list(self._grid.get_nodes())

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages that are not for training; their ids.

        Raises:
            RunError: for a training message, whose reply nothing would mask.
        """
        sent = list(messages)
        if any(map(_trains, sent)):
            raise RunError("secure aggregation: send training messages with send_and_receive")
        return self._grid.push_messages(sent)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies there are."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies; training takes the four stages of the protocol, each with this timeout."""
        sent = list(messages)
        training = [message for message in sent if _trains(message)]
        others = [message for message in sent if not _trains(message)]
        replies = list(self._grid.send_and_receive(others, timeout=timeout)) if others else []
        return [*replies, *(self._aggregate(training, timeout) if training else [])]

    def _aggregate(self, messages: Sequence[Message], timeout: float | None) -> list[Message]:
        state = self._start(messages, timeout)
        try:
            self._keys(state)
            ciphertexts = self._shares(state)
            self._collect(state, ciphertexts)
            moved = self._unmask(state)
        except _Halted as halted:
            reason = _error(f"secure aggregation: no sum: {halted}")
            return [Message(state.errors.get(node, reason), reply_to=message) for node, message in state.asked.items()]
        errors = {node: Message(error, reply_to=state.asked[node]) for node, error in state.errors.items()}
        for node in errors.keys() & state.vectors.keys():
            silent = errors.pop(node)
            if self._operator:
                self._operator.unanswered(silent, node=node)
        models: dict[int, ArrayRecord] = {}
        for node in state.vectors:
            record = _model(state.asked[node])[1]
            models[id(record)] = models.get(id(record)) or _moved(record, moved)
        return [*errors.values(), *(_reply(state, node, models[id(_model(state.asked[node])[1])]) for node in state.vectors)]

    def _start(self, messages: Sequence[Message], timeout: float | None) -> _Round:
        asked = {message.metadata.dst_node_id: message for message in messages}
        options = self._operator.announce(self._options) if self._operator else self._options
        ring, numbers = list(asked), options.numbers(len(asked))
        if numbers.shares < len(ring):
            self._rng.shuffle(ring)
        reach = range(-(numbers.shares // 2), numbers.shares // 2 + 1)
        neighbours = {node: sorted({ring[(place + step) % len(ring)] for step in reach}) for place, node in enumerate(ring)}
        return _Round(asked=asked, numbers=numbers, neighbours=neighbours, timeout=timeout)

    def _keys(self, state: _Round) -> None:
        """Stage one: everybody makes two pairs of keys."""
        if len({_layout(message) for message in state.asked.values()}) > 1:
            raise _Halted("nodes were sent models of different layers, whose updates cannot be added; send all of them one model")
        configs: dict[str, Any] = {
            Key.STAGE: Stage.SETUP,
            Key.SAMPLE_NUMBER: len(state.asked),
            Key.SHARE_NUMBER: state.numbers.shares,
            Key.THRESHOLD: state.numbers.threshold,
            Key.CLIPPING_RANGE: state.numbers.clipping_range,
            Key.TARGET_RANGE: state.numbers.steps,
            Key.MOD_RANGE: MODULUS,
            Key.MAX_WEIGHT: state.numbers.max_weight,
        }
        found = self._ask(state, dict.fromkeys(state.asked, configs), (Key.PUBLIC_KEY_1, Key.PUBLIC_KEY_2))
        for node, reply in found.items():
            state.keys[node] = [_told(reply)[Key.PUBLIC_KEY_1], _told(reply)[Key.PUBLIC_KEY_2]]
        state.need(state.keys, "their keys")

    def _shares(self, state: _Round) -> dict[int, list[bytes]]:
        """Stage two: everybody splits its secrets among its neighbours; the ciphertexts by the node they are for."""
        configs: dict[int, dict[str, Any]] = {
            node: {
                Key.STAGE: Stage.SHARE_KEYS,
                **{str(one): state.keys[one] for one in state.neighbours[node] if one in state.keys},
            }
            for node in state.keys
        }
        found = self._ask(state, configs, (Key.DESTINATION_LIST, Key.CIPHERTEXT_LIST))
        state.sources = {node: [] for node in found}
        forwarded: dict[int, list[bytes]] = {node: [] for node in found}
        for source, reply in found.items():
            told = _told(reply)
            for node, ciphertext in zip(told[Key.DESTINATION_LIST], told[Key.CIPHERTEXT_LIST], strict=True):
                if node in found:
                    state.sources[node].append(source)
                    forwarded[node].append(ciphertext)
        state.need(found, "shares of their secrets")
        return forwarded

    def _collect(self, state: _Round, ciphertexts: Mapping[int, list[bytes]]) -> None:
        """Stage three: everybody trains, and sends its update under masks."""
        configs: dict[int, dict[str, Any]] = {
            node: {
                Key.STAGE: Stage.COLLECT_MASKED_VECTORS,
                Key.CIPHERTEXT_LIST: ciphertexts[node],
                Key.SOURCE_LIST: state.sources[node],
            }
            for node in state.sources
        }
        size = state.size
        for node, reply in self._ask(state, configs, (Key.MASKED_PARAMETERS,), with_model=True).items():
            vector = _vector(_told(reply)[Key.MASKED_PARAMETERS])
            if vector is not None and len(vector) == size and "metrics" in reply.content.metric_records:
                state.vectors[node], state.replies[node] = vector, reply
            else:
                state.errors[node] = _error(f"no masked update of {size} entries with its metrics")
        state.need(state.vectors, "a masked update")

    def _unmask(self, state: _Round) -> NDArray[np.float64]:
        """Stage four: shares of the own masks of all who sent an update, and of the keys of all who did not."""
        honest = {
            node: Unmask(
                alive=tuple(one for one in [*state.sources[node], node] if one in state.vectors),
                dropped=tuple(one for one in state.sources[node] if one not in state.vectors),
            )
            for node in state.vectors
        }
        asked = self._operator.unmask(honest, threshold=state.numbers.threshold) if self._operator else honest
        configs: dict[int, dict[str, Any]] = {
            node: {
                Key.STAGE: Stage.UNMASK,
                Key.ACTIVE_NODE_ID_LIST: list(request.alive),
                Key.DEAD_NODE_ID_LIST: list(request.dropped),
            }
            for node, request in asked.items()
        }
        found = self._ask(state, configs, (Key.SHARE_LIST,))
        seeds: dict[int, list[bytes]] = {node: [] for node in state.sources}
        keys: dict[int, list[bytes]] = {node: [] for node in state.sources}
        for node, reply in found.items():
            places = [*(seeds[one] for one in asked[node].alive), *(keys[one] for one in asked[node].dropped)]
            shares = _told(reply)[Key.SHARE_LIST]
            if len(shares) != len(places):
                state.errors[node] = _error(f"{len(shares)} shares, asked for {len(places)}")
                continue
            for place, share in zip(places, shares, strict=True):
                place.append(share)
        try:
            self._open(state, seeds, keys)
            return self._sum(state, seeds, keys, answered=len(found))
        except (ValueError, TypeError) as error:
            raise _Halted(f"the shares that came are not of one secret ({error})") from error

    def _open(self, state: _Round, seeds: Mapping[int, list[bytes]], keys: Mapping[int, list[bytes]]) -> None:
        """Hand the operator every update whose masks it can take off."""
        if self._operator is None:
            return
        for node, vector in state.vectors.items():
            if min(len(seeds[node]), len(keys[node])) >= state.numbers.threshold:
                own = masks.own_mask(seeds[node], size=state.size)
                others = masks.pair_masks(keys[node], node, state.public(node, state.sources[node]), size=state.size)
                bare = vector - own - others
                if int(bare[0]) % MODULUS == state.weight(node) > 0:
                    moved = masks.mean(bare, state.numbers, nodes=1)
                    self._operator.opened(_reply(state, node, _moved(_model(state.asked[node])[1], moved)), node=node)

    def _sum(
        self, state: _Round, seeds: Mapping[int, list[bytes]], keys: Mapping[int, list[bytes]], *, answered: int
    ) -> NDArray[np.float64]:
        for node in state.sources:
            if len((seeds if node in state.vectors else keys)[node]) < state.numbers.threshold:
                raise _Halted(
                    f"{answered} of {len(state.vectors)} nodes helped to unmask, and {state.numbers.threshold} are needed"
                )
        total, alive = masks.added(state.vectors.values()), list(state.vectors)
        for node in state.sources:
            if node in state.vectors:
                total -= masks.own_mask(seeds[node], size=state.size)
            else:
                total += masks.pair_masks(keys[node], node, state.public(node, alive), size=state.size)
        weight = sum(map(state.weight, alive))
        if not weight or int(total[0]) % MODULUS != weight:
            raise _Halted(
                "the weights do not add up; the sites together must have examples, and fewer than "
                f"{MODULUS // state.numbers.steps} times max_weight = {state.numbers.max_weight:g}"
            )
        return masks.mean(total, state.numbers, nodes=len(alive))

    def _ask(
        self, state: _Round, configs: Mapping[int, Mapping[str, Any]], keys: Sequence[str], *, with_model: bool = False
    ) -> dict[int, Message]:
        """What each node answers in one stage; errors are kept, and who answers without ``keys`` counts as an error."""
        sent = [_message(state.asked[node], configs[node], with_model=with_model) for node in configs]
        replies = list(self._grid.send_and_receive(sent, timeout=state.timeout))
        by_id = {message.metadata.message_id: message.metadata.dst_node_id for message in sent if message.metadata.message_id}
        found: dict[int, Message] = {}
        for reply in replies:
            node = by_id.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id)
            if reply.has_error():
                state.errors[node] = reply.error
            elif CONFIGS not in reply.content.config_records or not set(keys) <= set(_told(reply)):
                state.errors[node] = _error("the reply is not of secure aggregation")
            else:
                found[node] = reply
        for node in configs.keys() - found.keys() - state.errors.keys():
            state.errors[node] = Error(ErrorCode.MESSAGE_UNAVAILABLE, "no reply to a message of secure aggregation")
        return {node: found[node] for node in configs if node in found}


def _trains(message: Message) -> bool:
    return message.metadata.message_type.split(".")[0] == "train"


def _layout(message: Message) -> tuple[tuple[str, tuple[int, ...]], ...]:
    records = message.content.array_records.values()
    return tuple((key, tuple(array.shape)) for record in records for key, array in record.items())


def _message(asked: Message, configs: Mapping[str, Any], *, with_model: bool) -> Message:
    """A message of one stage: the strategy's own configuration, the protocol's, and in the third stage the model."""
    records = {key: record for key, record in asked.content.items() if with_model or isinstance(record, ConfigRecord)}
    content = RecordDict({**records, CONFIGS: ConfigRecord(dict(configs))})
    about = asked.metadata
    return Message(content, about.dst_node_id, MessageType.TRAIN, ttl=about.ttl, group_id=about.group_id)


def _vector(parts: Any) -> Masked | None:
    """The masked vector in a reply, its weight in front; ``None`` if it cannot be read."""
    try:
        found = np.concatenate([bytes_to_ndarray(part).reshape(-1) for part in parts])
    except (ValueError, TypeError, EOFError):
        return None
    return found.astype(np.int64) if np.issubdtype(found.dtype, np.integer) else None


def _error(reason: str) -> Error:
    return Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason)


def _told(reply: Message) -> Mapping[str, Any]:
    return reply.content.config_records[CONFIGS]


def _model(asked: Message) -> tuple[str, ArrayRecord]:
    """The model in a training message, with the name of its record."""
    ((name, record),) = asked.content.array_records.items()
    return name, record


def _moved(record: ArrayRecord, moved: NDArray[np.float64]) -> ArrayRecord:
    """The model sent with ``moved`` added to its floating entries, which stand there one after another; counters as they were."""
    state, place = record.to_torch_state_dict(), 0
    for key, value in state.items():
        if value.is_floating_point():
            step = torch.from_numpy(moved[place : place + value.numel()]).view(value.shape)
            state[key] = (value.double() + step).to(value.dtype)
            place += value.numel()
    return ArrayRecord(state)


def _reply(state: _Round, node: int, model: ArrayRecord) -> Message:
    """A node's reply to what the strategy asked: its metrics, and ``model``."""
    asked = state.asked[node]
    metrics = state.replies[node].content.metric_records["metrics"]
    return Message(RecordDict({_model(asked)[0]: model, "metrics": metrics}), reply_to=asked)
