"""The wiretap: any honest Flower strategy with the adversary around it, who records what is granted and may arm what is sent."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import ErrorCode
from flwr.serverapp import Grid
from flwr.serverapp.exception import AggregationError, InconsistentMessageReplies
from flwr.serverapp.strategy import Result, Strategy

from flpriv.attack import ProtocolTrap, Trap
from flpriv.capture import Observation
from flpriv.errors import ThreatError, UpdateError
from flpriv.finding import Event
from flpriv.progress import tell
from flpriv.secure_aggregation import SecureAggregation, Unmask
from flpriv.state import State, check_finite, check_like
from flpriv.store import Sink
from flpriv.strategies import checkpoint
from flpriv.strategies.checkpoint import History
from flpriv.sums import Sum
from flpriv.threat import NAMED, Can

T = TypeVar("T")
_HOOKS = ("configure_train", "aggregate_train", "configure_evaluate", "aggregate_evaluate")


@dataclass(frozen=True, kw_only=True)
class _Delivery:
    """One training message on its way."""

    message: Message
    record: str
    honest: State
    sent: State
    nodes: tuple[int, ...]

    @property
    def armed(self) -> bool:
        return self.sent is not self.honest


class Wiretap(Strategy):
    """Wraps an instance of any Flower strategy; without a trap the final weights are those of the bare strategy, bit for bit.

    A federation survives what single clients do: an error reply, no reply, NaN values, other layers, other metrics or no
    examples become an event, and the reply is left out before the honest strategy sees it. Such a reply is not captured.

    Args:
        honest: the strategy that aggregates; its own class may be anything.
        sink: where the capture goes. A path grants the adversary what an honest-but-curious server has, and ``Can.TAMPER`` where
            there is a trap.
        trap: what a malicious operator sends in place of the honest model.
        tamper_rounds: rounds in which the trap is delivered.
        victims: to how many nodes it is delivered, the first of the grid that are asked; ``None`` for all.
        label: of the attack that brings the trap, noted with each observation it caused.
        architecture: label under which armed nodes find the model definition the operator ships; empty for the agreed one.
        checkpoints: folder for a checkpoint after each round; none are written without it.
        resume: go on after the last checkpoint.

    Raises:
        ThreatError: for a trap without ``Can.TAMPER``.
        CaptureError: if the folder of ``sink`` holds a capture already, or a file cannot be written.
    """

    def __init__(
        self,
        honest: Strategy,
        sink: Sink | Path | str,
        *,
        trap: Trap | None = None,
        tamper_rounds: Sequence[int] = (1,),
        victims: int | None = None,
        label: str = "",
        architecture: str = "",
        checkpoints: Path | None = None,
        resume: bool = False,
    ) -> None:
        if not isinstance(sink, Sink):
            tamper = Can.TAMPER if trap else Can(0)
            sink = Sink(sink, granted=NAMED["honest-but-curious"] | tamper, resume=resume)
        if trap and Can.TAMPER not in sink.granted:
            raise ThreatError("a trap needs 'tamper', which the threat model does not grant")
        self.honest, self.sink, self.trap = honest, sink, trap
        self.tamper_rounds, self.label, self.architecture = frozenset(tamper_rounds), label, architecture
        self.victims, self.checkpoints, self.resume = victims, checkpoints, resume
        self.history = History()
        self._honest = {name: getattr(honest, name) for name in _HOOKS}
        self._weight = _weight(honest)
        self._arrays = ArrayRecord()
        self._done = self._total = self._round = 0
        self._deliveries: dict[int, _Delivery] = {}
        self._sum = Sum()
        self._records: dict[tuple[int, ...], tuple[State, ArrayRecord]] = {}
        self._asked: list[Message] = []

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord,
        num_rounds: int = 3,
        timeout: float = 3600,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run the federation, or what is left of it; the result covers all rounds, those before a restart included."""
        self._arrays, self._total = initial_arrays, num_rounds
        if self.resume and self.checkpoints and (found := checkpoint.load(self.checkpoints, self.honest)):
            self._done, self._arrays, self.history = found
        self.sink.discard_after(self._done)
        if not self._done:
            self.sink.initial(initial_arrays.to_torch_state_dict())
        with self._inserted() as run:
            run(
                grid,
                self._arrays,
                num_rounds=num_rounds - self._done,
                timeout=timeout,
                train_config=train_config,
                evaluate_config=evaluate_config,
                evaluate_fn=self._central(evaluate_fn) if evaluate_fn else None,
            )
        self.sink.finish(self._arrays.to_torch_state_dict())
        train, evaluate, central = (
            {round: MetricRecord(metrics) for round, metrics in rounds.items()}
            for rounds in (self.history.train, self.history.evaluate, self.history.central)
        )
        return Result(self._arrays, train, evaluate, central)

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """The honest strategy's messages, those to armed nodes replaced."""
        round = self._round = server_round + self._done
        self._arrays = arrays
        messages = list(self._honest["configure_train"](round, arrays, config, grid))
        states: dict[int, State] = {}
        self._deliveries, self._sum, self._records = {}, Sum(), {}
        asked = {message.metadata.dst_node_id for message in messages}
        nodes = tuple(node for node in grid.get_node_ids() if node in asked)[: self.victims] if self.trap else ()
        return [self._deliver(message, round, states, nodes) for message in messages]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Record the replies, then let the honest strategy aggregate those it can."""
        round, replies = server_round + self._done, list(replies)
        nodes = self._nodes(round, replies, [delivery.message for delivery in self._deliveries.values()])
        read = [reply for reply in replies if self._read(reply, nodes[id(reply)], round)]
        if (seen := self._sum.observation()) is not None:
            self.sink.observe(seen)
        kept = self._consistent(round, read, nodes, arrays=True)
        nothing: tuple[ArrayRecord | None, MetricRecord | None] = (None, None)
        arrays, metrics = self._aggregated(round, "aggregate_train", kept, nothing)
        self._arrays = self._arrays if arrays is None else arrays
        if metrics is not None:
            self.history.train[round] = dict(metrics)
        if self.trap:
            self.sink.keep(self.trap.secrets)
        self.sink.finish_round(round, model=self._arrays.to_torch_state_dict())
        self._deliveries = {}
        return arrays, metrics

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> list[Message]:
        """The honest strategy's messages; evaluation is never tampered with."""
        self._asked = list(self._honest["configure_evaluate"](server_round + self._done, arrays, config, grid))
        return self._asked

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Let the honest strategy aggregate the replies it can, and close the round."""
        round, replies = server_round + self._done, list(replies)
        kept = self._consistent(round, replies, self._nodes(round, replies, self._asked), arrays=False)
        metrics: MetricRecord | None = self._aggregated(round, "aggregate_evaluate", kept, None)
        self._asked = []
        if metrics is not None:
            self.history.evaluate[round] = dict(metrics)
        if self.checkpoints:
            checkpoint.save(self.checkpoints, round=round, arrays=self._arrays, strategy=self.honest, history=self.history)
        tell("rounds", round, self._total)
        return metrics

    def announce(self, agreed: SecureAggregation) -> SecureAggregation:
        """Under secure aggregation, the options that the sites are told: what a trap in the protocol makes of them."""
        trap = self._protocol_trap
        return agreed if trap is None else trap.announce(agreed, round=self._round)

    def unmask(self, honest: Mapping[int, Unmask], *, threshold: int) -> Mapping[int, Unmask]:
        """Under secure aggregation, what each node is asked to unmask: what a trap in the protocol makes of it."""
        trap, nodes = self._protocol_trap, next((delivery.nodes for delivery in self._deliveries.values()), ())
        return honest if trap is None else trap.unmask(honest, round=self._round, nodes=nodes, threshold=threshold)

    @property
    def _protocol_trap(self) -> ProtocolTrap | None:
        return self.trap if isinstance(self.trap, ProtocolTrap) and self._round in self.tamper_rounds else None

    def opened(self, reply: Message, *, node: int) -> None:
        """Record the reply of a node whose masks a trap in the protocol took off."""
        delivery = self._deliveries[node]
        returned = reply.content.array_records[delivery.record].to_torch_state_dict()
        seen = self._observation(reply, delivery, returned, node, self._round)
        self.sink.observe(replace(seen, trap=self.label, opened=True))

    def unanswered(self, reply: Message, *, node: int) -> None:
        """Take note of a node that would not help to unmask."""
        self._note(self._round, node, _why(reply))

    def summary(self) -> None:
        """The honest strategy's summary."""
        self.honest.summary()

    def _deliver(self, message: Message, round: int, states: dict[int, State], nodes: tuple[int, ...]) -> Message:
        """The message to send; states are read once for all messages that share a record."""
        name = _arrays_name(message.content)
        if name is None:
            return message
        record, node = message.content.array_records[name], message.metadata.dst_node_id
        if id(record) not in states:
            states[id(record)] = record.to_torch_state_dict()
        honest = sent = states[id(record)]
        if self.trap and round in self.tamper_rounds and node in nodes:
            armed = self.trap.arm(honest, round=round, node=node, nodes=nodes)
            sent = honest if armed is None else armed
        if sent is not honest:
            message = self._armed(message, name, sent)
        self._deliveries[node] = _Delivery(message=message, record=name, honest=honest, sent=sent, nodes=nodes)
        return message

    def _armed(self, message: Message, name: str, state: State) -> Message:
        alike = tuple(map(id, state.values()))
        if alike not in self._records:
            self._records[alike] = state, ArrayRecord(dict(state))
        content = RecordDict({**message.content, name: self._records[alike][1]})
        for key, config in message.content.config_records.items():
            shipped = {"architecture": self.architecture} if self.architecture else {}
            content[key] = ConfigRecord({**config, **shipped})
        about = message.metadata
        return Message(content, about.dst_node_id, about.message_type, ttl=about.ttl, group_id=about.group_id)

    def _nodes(self, round: int, replies: Sequence[Message], asked: Sequence[Message]) -> dict[int, int]:
        """``id(reply)`` to the node it is from; an event for every error, and for every node that did not reply."""
        to = {message.metadata.message_id: message.metadata.dst_node_id for message in asked if message.metadata.message_id}
        nodes = {id(reply): to.get(reply.metadata.reply_to_message_id, reply.metadata.src_node_id) for reply in replies}
        for reply in replies:
            if reply.has_error():
                self._note(round, nodes[id(reply)], _why(reply))
        for message in asked:
            if message.metadata.dst_node_id not in nodes.values():
                self._note(round, message.metadata.dst_node_id, f"no reply to the {message.metadata.message_type} message")
        return nodes

    def _read(self, reply: Message, node: int, round: int) -> bool:
        """Record one training reply and disarm it; whether the honest strategy may have it."""
        delivery = self._deliveries.get(node)
        if reply.has_error() or delivery is None:
            return True
        record = reply.content.array_records.get(delivery.record)
        name = delivery.record if record is not None else _arrays_name(reply.content)
        if name is None:
            return True
        try:
            returned = _returned(reply.content.array_records[name])
            check_like(returned, delivery.sent, who="reply left out")
            check_finite(returned, who="reply left out")
        except UpdateError as error:
            self._note(round, node, str(error))
            return False
        seen = self._observation(reply, delivery, returned, node, round)
        if Can.SEE_UPDATES in self.sink.granted:
            self.sink.observe(seen)
        elif Can.SEE_MODELS in self.sink.granted:
            self._sum.add(seen)
        if self.trap and delivery.armed:
            honest = self.trap.disarm(returned, sent=delivery.sent, honest=delivery.honest)
            reply.content[name] = ArrayRecord({key: honest[key] for key in delivery.honest})
        return True

    def _observation(self, reply: Message, delivery: _Delivery, returned: State, node: int, round: int) -> Observation:
        metrics = {key: value for record in reply.content.metric_records.values() for key, value in record.items()}
        numbers = {key: float(value) for key, value in metrics.items() if isinstance(value, int | float)}
        examples = numbers.pop(self._weight or "num-examples", None)
        return Observation(
            round=round,
            node=node,
            sent=delivery.sent,
            returned=returned,
            examples=int(examples) if examples is not None and math.isfinite(examples) else None,
            metrics=numbers,
            trap=self.label if delivery.armed else "",
            nodes=delivery.nodes,
        )

    def _consistent(self, round: int, replies: Sequence[Message], nodes: Mapping[int, int], *, arrays: bool) -> list[Message]:
        """The replies a Flower strategy can average together, and the error replies, which it counts itself.

        Metrics must be those of most replies, the weight a number, and the weights not all zero. A strategy that states no
        weight is handed everything.
        """
        if self._weight is None:
            return list(replies)
        good = [reply for reply in replies if not reply.has_error()]
        left_out = {id(reply): what for reply in good if (what := self._unfit(reply, arrays=arrays))}
        fit = [reply for reply in good if id(reply) not in left_out]
        common = Counter(map(_signature, fit)).most_common(1)
        odd = "its metrics are not those of the other replies"
        left_out |= {id(reply): odd for reply in fit if _signature(reply) != common[0][0]}
        fit = [reply for reply in fit if id(reply) not in left_out]
        if not sum(_number(reply, self._weight) for reply in fit):
            left_out |= {id(reply): f"{self._weight!r} is 0 in every reply" for reply in fit}
        for reply in good:
            if id(reply) in left_out:
                self._note(round, nodes[id(reply)], f"reply left out: {left_out[id(reply)]}")
        return [reply for reply in replies if id(reply) not in left_out]

    def _unfit(self, reply: Message, *, arrays: bool) -> str:
        """Why a Flower strategy cannot use the reply by itself; empty if it can."""
        if arrays and len(reply.content.array_records) != 1:
            return f"{len(reply.content.array_records)} array records, expected one"
        if len(reply.content.metric_records) != 1:
            return f"{len(reply.content.metric_records)} metric records, expected one"
        weight = _number(reply, self._weight or "")
        return "" if math.isfinite(weight) and weight >= 0 else f"no usable {self._weight!r} among its metrics"

    def _aggregated(self, round: int, hook: str, replies: list[Message], otherwise: T) -> T:
        try:
            found: T = self._honest[hook](round, replies)
        except (AggregationError, InconsistentMessageReplies) as error:
            self._note(round, "server", f"the strategy could not aggregate: {error}")
            return otherwise
        return found

    def _note(self, round: int, who: int | str, what: str) -> None:
        self.history.events.append(Event(round=round, who=str(who), what=what))

    def _central(
        self, evaluate: Callable[[int, ArrayRecord], MetricRecord | None]
    ) -> Callable[[int, ArrayRecord], MetricRecord | None]:
        def evaluated(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            round = server_round + self._done
            metrics = evaluate(round, arrays)
            if metrics is not None:
                self.history.central[round] = dict(metrics)
            return metrics

        return evaluated

    @contextmanager
    def _inserted(self) -> Iterator[Callable[..., Result]]:
        """The ``start`` to call: Flower's own, or the honest strategy's where it wrote one, with our hooks in its place."""
        if type(self.honest).start is Strategy.start:
            yield super().start
            return
        for name in _HOOKS:
            setattr(self.honest, name, getattr(self, name))
        try:
            yield self.honest.start
        finally:
            for name in _HOOKS:
                delattr(self.honest, name)


def _arrays_name(content: RecordDict) -> str | None:
    """The record that holds the model: the only one, or the one called ``"arrays"``."""
    names = list(content.array_records)
    return names[0] if len(names) == 1 else "arrays" if "arrays" in names else None


def _returned(record: ArrayRecord) -> State:
    try:
        return record.to_torch_state_dict()
    except (TypeError, ValueError, EOFError) as error:
        raise UpdateError(f"reply left out: its arrays cannot be read ({type(error).__name__})") from error


def _weight(strategy: Strategy) -> str | None:
    """The metric a strategy weighs replies by, its own or that of the strategy it wraps in turn."""
    if isinstance(key := getattr(strategy, "weighted_by_key", None), str):
        return key
    inner = getattr(strategy, "strategy", None)
    return _weight(inner) if isinstance(inner, Strategy) else None


def _number(reply: Message, key: str) -> float:
    """A metric of a reply, NaN where it has none of that name."""
    values = [record[key] for record in reply.content.metric_records.values() if key in record]
    return float(values[0]) if values and isinstance(values[0], int | float) else math.nan


def _signature(reply: Message) -> tuple[object, ...]:
    """What must agree among replies for Flower to average them: names, and lengths of lists."""
    records = reply.content.metric_records.items()
    metrics = [(name, key, len(v) if isinstance(v, list) else 0) for name, record in records for key, v in record.items()]
    return tuple(sorted(metrics)), tuple(reply.content.array_records)


def _why(reply: Message) -> str:
    """An error reply in one line of at most 300 characters: the first, or the last of what Ray makes of it; never a traceback."""
    lines = [line.strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", reply.error.reason or "").splitlines() if line.strip()]
    reason = (lines[-1 if "ray::" in lines[0] else 0] if lines else "no reason given")[:300]
    if reply.error.code == ErrorCode.MOD_FAILED_PRECONDITION:
        train = reply.metadata.message_type.split(".")[0] == "train"
        return f"{'refused' if train else 'not evaluated'}: {reason}"
    return f"error {reply.error.code}: {reason}"
