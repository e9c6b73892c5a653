"""A tiny federation in this process: a linear model with BatchNorm, sites with data of their own, and faults on demand."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity
from torch import nn

Fault = Callable[[Message, Callable[[], Message]], Message | None]
"""Takes the message sent and a function that gives the honest reply; gives the reply that arrives, or ``None``."""


def model(seed: int = 0) -> nn.Module:
    """Six inputs, BatchNorm (so that there are buffers and a counter), two classes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2))


def train(state: Mapping[str, torch.Tensor], *, node: int, round: int) -> tuple[dict[str, torch.Tensor], float]:
    """One step of SGD on data that depend on the node and the round."""
    net = model()
    net.load_state_dict(dict(state))
    rng = torch.Generator().manual_seed(node * 1000 + round)
    images, labels = torch.randn(8, 6, generator=rng), torch.randint(0, 2, (8,), generator=rng)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    loss = nn.functional.cross_entropy(net(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return net.state_dict(), loss.item()


class TinyGrid(Grid):
    """Nodes 11, 12, …; ``faults[(round, node)]`` alters a training reply, ``evaluate_faults`` an evaluation reply."""

    def __init__(self, nodes: int = 4, *, faults: Mapping[tuple[int, int], Fault] | None = None) -> None:
        TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1
        self.nodes = [11 + node for node in range(nodes)]
        self.faults = dict(faults or {})
        self.evaluate_faults: dict[tuple[int, int], Fault] = {}
        self.received: list[tuple[int, int, dict[str, torch.Tensor], dict[str, Any]]] = []
        self.stop_at: int | None = None
        self._ids = itertools.count()

    @property
    def run(self) -> Run:
        return Run.create_empty(run_id=1)

    def set_run(self, run: Run) -> None:
        raise NotImplementedError

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> list[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return [reply for message in messages if (reply := self._answer(message)) is not None]

    def _answer(self, message: Message) -> Message | None:
        message.metadata.__dict__["_message_id"] = f"m{next(self._ids)}"
        node, kind = message.metadata.dst_node_id, message.metadata.message_type
        if kind == "query":
            return Message(RecordDict({"site": ConfigRecord({"partition-id": 50 - node})}), reply_to=message)
        config = dict(message.content.config_records["config"])
        server_round = int(config["server-round"])  # type: ignore[arg-type]
        if self.stop_at == server_round:
            raise KeyboardInterrupt
        state = message.content.array_records["arrays"].to_torch_state_dict()
        if kind == "train":
            self.received.append((server_round, node, state, config))
        fault = (self.faults if kind == "train" else self.evaluate_faults).get((server_round, node))

        def honest() -> Message:
            if kind == "evaluate":
                metrics = MetricRecord({"num-examples": node, "accuracy": 0.5})
                return Message(RecordDict({"metrics": metrics}), reply_to=message)
            returned, loss = train(state, node=node, round=server_round)
            metrics = MetricRecord({"num-examples": node, "loss": loss})
            return Message(RecordDict({"arrays": ArrayRecord(returned), "metrics": metrics}), reply_to=message)

        return fault(message, honest) if fault else honest()


def error(code: int, reason: str) -> Fault:
    """The client answers with an error."""
    return lambda message, _: Message(Error(code, reason), reply_to=message)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    import logging

    logger = logging.getLogger("flwr")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    yield
    logger.setLevel(level)


@pytest.fixture
def tiny() -> type[TinyGrid]:
    """The grid of the tiny federation."""
    return TinyGrid


@pytest.fixture
def initial() -> ArrayRecord:
    """The first global model."""
    return ArrayRecord(model().state_dict())


@pytest.fixture
def failing() -> Callable[[int, str], Fault]:
    """Makes a fault: the client answers with an error of that code and reason."""
    return error
