"""The inline engine: a ServerApp and a ClientApp in this process, without Ray or sockets; a round costs milliseconds.

Names of Flower that are not part of its documented interface are used in :func:`_identity`, :func:`_name`, :func:`_copy` and
:class:`InlineGrid`'s ``run``, and nowhere else.
"""

from __future__ import annotations

import copy
import importlib
import logging
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.serverapp import Grid
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from flpriv import data
from flpriv.canary import canary_sites
from flpriv.engine.config import RunConfig
from flpriv.errors import FlprivError, RunError
from flpriv.files import private_folder
from flpriv.progress import track
from flpriv.seeds import derive

if TYPE_CHECKING:
    from flpriv.scenario import Scenario, Setting

Client = Callable[[Message, Context], Message]
"""A ClientApp, or anything that answers as one does."""
Server = Callable[[Grid, Context], None]
"""A ServerApp, or anything that runs as one does."""

CLIENT, SERVER = "flpriv.clients.app", "flpriv.strategies.server"
RUN_ID = 1


def run(scenario: Scenario, setting: Setting, *, folder: Path, resume: bool = False) -> None:
    """Run one setting with flpriv's own apps; every image is read before the first round.

    Args:
        scenario: the whole scenario.
        setting: one of its settings.
        folder: the setting's folder, made with mode 0700.
        resume: go on after the last finished round found in ``folder``.

    Raises:
        FlprivError: if the scenario or an image is wrong, or a file cannot be written.
        RunError: if the federation cannot be run to its end.
    """
    config = RunConfig(scenario=scenario, setting=setting, out=private_folder(folder).resolve(), resume=resume)
    try:
        nodes = _read_images(scenario, setting) + canary_sites(scenario, setting)
        clients, server = importlib.import_module(CLIENT).app, importlib.import_module(SERVER).app
        run_apps(clients, server, nodes=nodes, run_config=config.to_dict(), seed=scenario.seed)
    except FlprivError:
        raise
    except Exception as error:
        raise RunError(f"setting {setting.id!r}: {type(error).__name__}: {error}") from error


def _read_images(scenario: Scenario, setting: Setting) -> int:
    """Read what the sites will need, so that a bad image ends the run before it starts; the number of nodes."""
    sites = range(len(data.sites(scenario)))
    for site in track(sites, "reading images"):
        data.records(scenario, site, "train")
        data.records(scenario, site, "test")
    return len(data.nodes(scenario, setting.arrangement))


def run_apps(
    client_app: Client,
    server_app: Server,
    *,
    nodes: int,
    run_config: Mapping[str, Any],
    node_configs: Mapping[int, Mapping[str, Any]] | None = None,
    seed: int = 0,
) -> Context:
    """Run any two Flower apps in this process, on one thread, and return the server's context.

    The global random states of ``random``, NumPy and torch are seeded before and put back after; Flower's log shows errors only.

    Args:
        client_app: answers every message.
        server_app: runs to its end.
        nodes: how many nodes, ≥ 1; node ``i`` has ``partition-id = i`` and ``num-partitions = nodes``.
        run_config: what both apps find in ``context.run_config``.
        node_configs: further entries of node ``i``'s ``context.node_config``.
        seed: of the node ids and the random states.
    """
    with _surroundings(seed):
        grid = InlineGrid(client_app, nodes=nodes, run_config=run_config, node_configs=node_configs or {}, seed=seed)
        context = Context(
            run_id=RUN_ID, node_id=SUPERLINK_NODE_ID, node_config={}, state=RecordDict(), run_config=dict(run_config)
        )
        server_app(grid, context)
        return context


class InlineGrid(Grid):
    """A grid whose nodes answer within the call, one after another.

    Node ids follow from the seed, and their order says nothing about the order of the sites. Neither side can change what the
    other holds: records are copied on their way, the bytes of arrays, which cannot be changed, are shared.

    Args:
        client_app: answers every message; what it raises becomes an error reply, as with Flower's own engines.
        nodes: how many.
        run_config: for every node's context.
        node_configs: further entries by place.
        seed: of the node ids.
    """

    def __init__(
        self,
        client_app: Client,
        *,
        nodes: int,
        run_config: Mapping[str, Any],
        node_configs: Mapping[int, Mapping[str, Any]],
        seed: int,
    ) -> None:
        self._app = client_app
        self._replies: dict[str, Message] = {}
        self._sent = 0
        self._run = Run.create_empty(run_id=RUN_ID)
        self._contexts = {
            node: Context(
                run_id=RUN_ID,
                node_id=node,
                node_config={"partition-id": place, "num-partitions": nodes, **node_configs.get(place, {})},
                state=RecordDict(),
                run_config=dict(run_config),
            )
            for place, node in enumerate(derive(seed, "node", place) for place in range(nodes))
        }

    @property
    def run(self) -> Run:
        """Run information."""
        return self._run

    def set_run(self, run: Run) -> None:
        """Set the run this grid operates in."""
        self._run = run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """A new message."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> list[int]:
        """All nodes, sorted."""
        return sorted(self._contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Have every message answered; their ids."""
        return [self._answer(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """The replies to these messages, each once."""
        return [self._replies.pop(id) for id in message_ids if id in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Have every message answered and return the replies in the same order; nothing times out within a process."""
        return self.pull_messages(self.push_messages(messages))

    def _answer(self, message: Message) -> str:
        self._sent += 1
        id = _name(message, f"message-{self._sent}")
        delivered = _copy(message)
        try:
            reply = self._app(delivered, self._contexts[message.metadata.dst_node_id])
        except Exception as error:
            reason = f"{type(error)}:<'{error}'>"
            reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=delivered)
        _name(reply, f"reply-{self._sent}")
        self._replies[id] = _copy(reply)
        return id


def _copy(message: Message) -> Message:
    """The same message with metadata and records of its own."""
    twin = copy.copy(message)
    vars(twin)["_metadata"] = copy.copy(message.metadata)
    if message.has_content():
        twin.content = RecordDict({key: _copy_record(record) for key, record in message.content.items()})
    return twin


def _copy_record(record: ArrayRecord | MetricRecord | ConfigRecord) -> ArrayRecord | MetricRecord | ConfigRecord:
    if isinstance(record, ArrayRecord):
        return ArrayRecord({key: Array(one.dtype, one.shape, one.stype, one.data) for key, one in record.items()})
    if isinstance(record, MetricRecord):
        return MetricRecord(copy.deepcopy(dict(record)))
    return ConfigRecord(copy.deepcopy(dict(record)))


def _name(message: Message, id: str) -> str:
    """Give a message its id, as Flower's engines do when it is sent; a reply tells which message it answers."""
    vars(message.metadata)["_message_id"] = id
    return id


@contextmanager
def _surroundings(seed: int) -> Iterator[None]:
    """Identity, log, threads and random states as a run needs them; all put back afterwards."""
    log, level = logging.getLogger("flwr"), logging.getLogger("flwr").level
    states, threads = (random.getstate(), np.random.get_state()), torch.get_num_threads()  # noqa: NPY002
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())), _identity():
        log.setLevel(logging.ERROR)
        torch.set_num_threads(1)
        random.seed(seed)
        np.random.seed(seed % 2**32)  # noqa: NPY002
        torch.manual_seed(seed)
        try:
            yield
        finally:
            log.setLevel(level)
            torch.set_num_threads(threads)
            random.setstate(states[0])
            np.random.set_state(states[1])  # noqa: NPY002


@contextmanager
def _identity() -> Iterator[None]:
    """The identity that Flower gives a server's process, without which it makes no message."""
    names = ("_task_id", "_run_id", "_node_id")
    before = {name: getattr(TaskIdentity, name) for name in names}
    for name, value in zip(names, (RUN_ID, RUN_ID, SUPERLINK_NODE_ID), strict=True):
        setattr(TaskIdentity, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(TaskIdentity, name, value)
