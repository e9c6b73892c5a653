"""The ServerApp: one setting from the first round to its result, on any engine."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MessageType, RecordDict
from flwr.proto.node_pb2 import NodeInfo
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import Result
from flwr.supercore.run import Run
from pydantic import TypeAdapter

from flpriv import data
from flpriv.attack import Attack, Trap
from flpriv.canary import canary_sites
from flpriv.engine.config import RunConfig, read_run_config
from flpriv.errors import RunError
from flpriv.files import private_folder
from flpriv.records import Records
from flpriv.registry import create
from flpriv.seeds import derive
from flpriv.store import Sink, write_json, write_tensors
from flpriv.strategies.building import build_strategy
from flpriv.strategies.checkpoint import History
from flpriv.strategies.secure_aggregation import SecureGrid, check_strategy
from flpriv.strategies.wiretap import Wiretap
from flpriv.task import Task
from flpriv.threat import Can

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the setting that the run-config names; leaves ``capture``, ``final.safetensors`` and ``result.json`` in its folder.

    ``wiretap = 0`` in the run-config runs the bare strategy: no capture, no checkpoint, no trap.

    Raises:
        FlprivError: if the scenario is wrong, sites do not show up, or a file cannot be written.
    """
    config = read_run_config(context)
    start = time.perf_counter()
    tapped = bool(context.run_config.get("wiretap", 1))
    result, history = _train(grid, config, tapped=tapped)
    write_tensors(config.out / "final.safetensors", result.arrays.to_torch_state_dict())
    rounds = [
        {
            "round": round,
            "train": dict(result.train_metrics_clientapp.get(round, {})),
            "evaluate": dict(result.evaluate_metrics_clientapp.get(round, {})),
        }
        for round in range(1, config.setting.rounds + 1)
    ]
    events = [{"round": event.round, "who": event.who, "what": event.what} for event in history.events]
    seconds = time.perf_counter() - start
    write_json(config.out / "result.json", _finite({"rounds": rounds, "events": events, "seconds": seconds}))


def _train(grid: Grid, config: RunConfig, *, tapped: bool) -> tuple[Result, History]:
    scenario, setting, out = config.scenario, config.setting, private_folder(config.out)
    sites = len(data.nodes(scenario, setting.arrangement)) + canary_sites(scenario, setting)
    task = data.task(scenario, setting.defenses)
    ordered = OrderedGrid.wait(grid, sites, timeout=scenario.federation.timeout)
    seed = derive(scenario.seed, "server", setting.id)
    random.seed(seed)
    np.random.seed(seed % 2**32)  # noqa: NPY002
    strategy = build_strategy(scenario.federation.strategy, scenario.federation.options, sites=sites, files=scenario.plugins)
    initial = ArrayRecord(task.build(seed=derive(scenario.seed, "model")).state_dict())
    secure = scenario.federation.secure_aggregation
    if secure:
        check_strategy(strategy, scenario.federation.strategy)
    if not tapped:
        grid = SecureGrid(ordered, secure, seed=seed) if secure else ordered
        result = strategy.start(grid, initial, num_rounds=setting.rounds, timeout=scenario.federation.timeout)
        return result, History()
    sink = Sink(
        out / "capture",
        granted=scenario.threat.granted,
        task=task,
        local=setting.local,
        defenses=_defenses(config),
        resume=config.resume,
    )
    malice = _malice(config, task)
    wiretap = Wiretap(
        strategy,
        sink,
        trap=malice.trap,
        tamper_rounds=scenario.threat_table.tamper_rounds,
        victims=scenario.threat_table.victims,
        label=setting.trap,
        architecture=malice.architecture,
        checkpoints=out / "checkpoint",
        resume=config.resume,
    )
    grid = SecureGrid(ordered, secure, operator=wiretap, seed=seed) if secure else ordered
    return wiretap.start(grid, initial, num_rounds=setting.rounds, timeout=scenario.federation.timeout), wiretap.history


def _defenses(config: RunConfig) -> list[tuple[str, dict[str, Any]]]:
    """The setting's defences by name, each with all its options, those left at their defaults included."""
    specs = map(config.scenario.defense, config.setting.defenses)
    stack = [create("defenses", spec.defense, spec.options, files=config.scenario.plugins) for spec in specs]
    return [(defense.name, TypeAdapter(type(defense)).dump_python(defense, mode="json")) for defense in stack]


@dataclass(frozen=True, kw_only=True)
class _Malice:
    """What a malicious operator does in a setting: nothing, unless it has a trap."""

    trap: Trap | None = None
    architecture: str = ""


def _malice(config: RunConfig, task: Task) -> _Malice:
    """The trap of the setting's attack, made from what the operator holds and the same on every run of the scenario."""
    scenario, label = config.scenario, config.setting.trap
    if not label:
        return _Malice()
    spec = scenario.attack(label)
    attack: Attack = create("attacks", spec.attack, spec.options, files=scenario.plugins)
    rng = torch.Generator().manual_seed(derive(scenario.seed, "trap", label))
    public = _public(config) if Can.KNOW_PUBLIC in scenario.threat.granted else None
    ships = type(attack).architecture is not Attack.architecture
    trap = attack.aim(task, public=public, candidates=_candidates(config, attack), rng=rng)
    return _Malice(trap=trap, architecture=label if ships else "")


def _public(config: RunConfig) -> Records | None:
    parts = [data.records(config.scenario, site, "public") for site in range(len(data.sites(config.scenario)))]
    parts = [part for part in parts if len(part)]
    return Records.concat(parts).anonymous() if parts else None


def _candidates(config: RunConfig, attack: Attack) -> Records | None:
    """The records asked about, where they are granted and the trap is made for them."""
    if Can.KNOW_CANDIDATES not in config.scenario.threat.granted or type(attack).aim is Attack.aim:
        return None
    from flpriv.knowledge import gather

    return gather(config.scenario).candidates.anonymous()


def _finite(value: object) -> object:
    """The same JSON with NaN and infinities as ``None``."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


class OrderedGrid(Grid):
    """A grid whose nodes stand in the order of their ``partition-id``, and whose replies stand in the order of their messages.

    Flower's node ids are random and replies come as they come; so ordered, sampling from ``random`` and the sums of floats are
    the same on every engine. The federation is fixed when it starts: a node that goes away later is still asked, and missed.

    Args:
        grid: the engine's own.
        nodes: in order.
    """

    def __init__(self, grid: Grid, nodes: Sequence[int]) -> None:
        self._grid, self._ordered = grid, tuple(nodes)

    @classmethod
    def wait(cls, grid: Grid, nodes: int, *, timeout: float) -> OrderedGrid:
        """Wait until as many nodes are there, and ask each which partition it holds.

        Raises:
            RunError: if fewer nodes are there after ``timeout`` seconds.
        """
        end = time.monotonic() + timeout
        while len(found := sorted(grid.get_node_ids())) < nodes:
            if time.monotonic() > end:
                raise RunError(
                    f"{len(found)} of {nodes} sites connected within {timeout:g} s; start the others, or raise federation.timeout"
                )
            time.sleep(0.2)
        queries = [Message(RecordDict(), node, MessageType.QUERY) for node in found]
        replies = OrderedGrid(grid, found).send_and_receive(queries, timeout=timeout)
        place = {reply.metadata.src_node_id: _partition(reply) for reply in replies}
        return cls(grid, sorted(found, key=lambda node: (place.get(node, nodes), node))[:nodes])

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
        """The nodes, in order."""
        return list(self._ordered)

    def get_nodes(self) -> list[NodeInfo]:
        """What is known of the nodes, in order."""
        known = {node.node_id: node for node in self._grid.get_nodes()}
        return [known[node] for node in self._ordered if node in known]

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Send messages; their ids."""
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """The replies there are."""
        return self._grid.pull_messages(message_ids)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages and wait for the replies, which come in the order of the messages."""
        sent = list(messages)
        replies = list(self._grid.send_and_receive(sent, timeout=timeout)) if sent else []
        by_id = {message.metadata.message_id: place for place, message in enumerate(sent) if message.metadata.message_id}
        by_node = {message.metadata.dst_node_id: place for place, message in enumerate(sent)}

        def place(reply: Message) -> int:
            about = reply.metadata
            return by_id.get(about.reply_to_message_id, by_node.get(about.src_node_id, len(sent)))

        return sorted(replies, key=place)


def _partition(reply: Message) -> int:
    """The partition a node says it holds; a large number if it says nothing."""
    if reply.has_content():
        for record in reply.content.config_records.values():
            if isinstance(value := record.get("partition-id"), int):
                return value
    return 2**31
