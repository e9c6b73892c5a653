"""The ClientApp that every site runs: local training behind the agreed defences, evaluation, and who am I.

What leaves a site is its update, a few numbers, and where something went wrong one sentence without names, paths or record
ids; the full story stays in the site's own folder.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.common.constant import ErrorCode
from torch import nn

from flpriv import data
from flpriv.arrangement import ArrangedSplit, Node
from flpriv.canary import Planted, name, plant, planted
from flpriv.clients.metrics import evaluate as measure
from flpriv.clients.secure_aggregation import masked
from flpriv.clients.training import Trained, train
from flpriv.clients.witness import log_error, write_witness
from flpriv.defense import Defense, Local, Loop, guard
from flpriv.engine.config import RunConfig, read_run_config
from flpriv.errors import UpdateError
from flpriv.files import private_folder
from flpriv.records import Records
from flpriv.registry import create
from flpriv.seeds import derive
from flpriv.state import add, check_finite, check_like
from flpriv.task import Task
from flpriv.witness import Witness, site_folder

app = ClientApp()


@app.train()
def train_message(message: Message, context: Context) -> Message:
    """Train the model received on the site's training records; the reply carries ``arrays`` and ``metrics``."""
    return _answer(message, context, _train)


@app.evaluate()
def evaluate_message(message: Message, context: Context) -> Message:
    """Evaluate the model received on the site's test records; the reply carries ``metrics``."""
    return _answer(message, context, _evaluate)


@app.query()
def query_message(message: Message, context: Context) -> Message:
    """Tell which site of the scenario this node is: ``site`` with ``partition-id`` and ``num-partitions``."""
    keys = ("partition-id", "num-partitions")
    content = ConfigRecord({key: int(context.node_config[key]) for key in keys if key in context.node_config})
    return Message(RecordDict({"site": content}), reply_to=message)


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    """What all sites share in a setting.

    Args:
        task: what is learnt.
        defenses: the stack, in order.
        model: a fresh one, to be copied and never trained.
    """

    task: Task
    defenses: tuple[Defense, ...]
    model: nn.Module


@lru_cache(maxsize=8)
def _agreed(run: RunConfig, architecture: str) -> _Agreed:
    """The setting's defences and model, in the definition that the attack labelled ``architecture`` ships where one is named."""
    scenario, files = run.scenario, run.scenario.plugins
    specs = [scenario.defense(label) for label in run.setting.defenses]
    task = data.task(scenario, run.setting.defenses)
    model = task.build()
    if architecture:
        spec = scenario.attack(architecture)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = create("attacks", spec.attack, spec.options, files=files).architecture(model, task)
    defenses = tuple(create("defenses", spec.defense, spec.options, files=files) for spec in specs)
    return _Agreed(task=task, defenses=defenses, model=model)


@lru_cache(maxsize=8)
def _planted(run: RunConfig) -> Planted | None:
    return planted(run.scenario, run.setting)


@dataclass(frozen=True, kw_only=True)
class _Visit:
    """One site's work on one message.

    Args:
        run: scenario and setting.
        site: index of the site, or of the node that the setting's arrangement has in place of sites; canaries that are sites
            stand behind those.
        round: 1, 2, ….
        architecture: label of the attack whose model definition came with the message, or empty.
        mu: weight of FedProx' proximal term, 0 for other strategies.
        folder: the site's private folder.
        noise_seed: of the defences' noise: the site's own ``defense-seed`` where its node config sets one, as a real site must,
            since whoever knows the seed can take the noise off; else the scenario's, so that an audit repeats.
        trained: what :meth:`train` left, empty before.
    """

    run: RunConfig
    site: int
    round: int
    architecture: str
    mu: float
    folder: Path
    noise_seed: int
    trained: list[Trained] = field(default_factory=list)

    @property
    def agreed(self) -> _Agreed:
        return _agreed(self.run, self.architecture)

    @property
    def canary(self) -> int | None:
        """Which canary this site is, if it is one."""
        behind = self.site - len(data.nodes(self.run.scenario, self.run.setting.arrangement))
        return behind if behind >= 0 else None

    @property
    def name(self) -> str:
        """The site's name."""
        return self.node.name if self.canary is None else name(self.canary)

    @cached_property
    def locals(self) -> tuple[Local, ...]:
        """Each defence's surroundings, by position."""
        scenario, labels = self.run.scenario, self.run.setting.defenses
        seeds = [derive(self.noise_seed, self.site, self.round, "defense", label) for label in labels]
        return tuple(
            Local(
                site=self.name,
                round=self.round,
                rng=torch.Generator().manual_seed(seed),
                folder=private_folder(self.folder),
                task=self.agreed.task,
                records=partial(self.records, "train") if self.canary is None else None,
                secure_aggregation=scenario.federation.secure_aggregation,
            )
            for seed in seeds
        )

    @property
    def node(self) -> Node:
        return data.nodes(self.run.scenario, self.run.setting.arrangement)[self.site]

    @property
    def planted(self) -> Planted | None:
        """The canaries, at the site that plants them."""
        found = _planted(self.run)
        return found if found is not None and found.place == self.site else None

    def records(self, split: ArrangedSplit) -> Records:
        own = data.node_records(self.run.scenario, self.run.setting.arrangement, self.site, split)
        return self.planted.joined(own) if self.planted is not None and split == "train" else own

    def model(self, message: Message, device: torch.device) -> nn.Module:
        """The agreed model with the weights received.

        Raises:
            UpdateError: naming the first layer that does not fit.
        """
        received = message.content.array_records["arrays"].to_torch_state_dict()
        model = copy.deepcopy(self.agreed.model)
        check_like(received, model.state_dict(), who=f"round {self.round}: the model received")
        model.load_state_dict(received)
        return model.to(device)

    def prepare(self, loop: Loop) -> Loop:
        """The loop as the defences want it; gradients that are canaries join each step after them."""
        if self.planted is not None:
            records, batch = len(self.records("train")), self.run.setting.local.batch_size
            plant(
                loop.model,
                loop.optimizer,
                self.planted.clipped(self.agreed.defenses),
                self.planted.included,
                batch=min(batch, records),
                records=records,
                seed=derive(self.run.scenario.seed, self.site, self.round, "canaries"),
            )
        for defense, local in zip(self.agreed.defenses, self.locals, strict=True):
            loop = defense.prepare(loop, local=local)
        return loop

    def train(self, message: Message, _: Context) -> Message:
        """Local training, as the defences' mod calls it.

        Raises:
            UpdateError: if training left NaN or infinite values.
        """
        if self.canary is not None:
            return self.sing(message, self.canary)
        device = _device()
        model, records, scenario = self.model(message, device), self.records("train"), self.run.scenario
        done = train(
            model,
            records,
            self.run.setting.local,
            classes=len(self.agreed.task.classes),
            seed=derive(scenario.seed, self.site, self.round, "train"),
            mu=self.mu,
            prepare=self.prepare,
            device=device,
        )
        self.trained.append(done)
        state = model.state_dict()
        check_finite(state, who=f"round {self.round}: the update")
        metrics = MetricRecord({"num-examples": len(records), "loss": done.loss})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    def sing(self, message: Message, row: int) -> Message:
        """What the canary at ``row`` sends as a site; it counts as one example."""
        found = _planted(self.run)
        assert found is not None
        received = message.content.array_records["arrays"].to_torch_state_dict()
        state = add(received, found.update(row, received))
        metrics = MetricRecord({"num-examples": 1, "loss": 0.0})
        return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)

    def witness(self, reply: Message, node: int) -> Witness:
        """What was really done."""
        ids = self.records("train").ids if self.canary is None else ()
        return Witness(
            site=self.name,
            node=node,
            round=self.round,
            steps=tuple(tuple(ids[row] for row in rows) for done in self.trained for rows in done.steps),
            notes={label: local.notes for label, local in zip(self.run.setting.defenses, self.locals, strict=True)},
            refused=reply.error.reason if reply.has_error() else None,
        )


def _train(visit: _Visit, message: Message, context: Context) -> Message:
    if visit.run.scenario.federation.secure_aggregation is None:
        return _update(visit, message, context)
    return masked(
        message,
        context,
        partial(_update, visit),
        defenses=visit.agreed.defenses,
        local=visit.locals.__getitem__,
        seed=derive(visit.noise_seed, visit.site, visit.round, "rounding"),
    )


def _update(visit: _Visit, message: Message, context: Context) -> Message:
    defenses = visit.agreed.defenses
    reply = guard(defenses, message, context, visit.train, local=visit.locals.__getitem__)
    if defenses and reply.has_content():
        check_finite(reply.content.array_records["arrays"].to_torch_state_dict(), who=f"round {visit.round}: the defended update")
    write_witness(visit.folder, visit.witness(reply, context.node_id))
    return reply


def _evaluate(visit: _Visit, message: Message, _: Context) -> Message:
    if visit.canary is not None:
        return _error(message, f"round {visit.round}: a canary holds no records", ErrorCode.MOD_FAILED_PRECONDITION)
    records = visit.records("test")
    if not len(records):
        return _error(message, f"round {visit.round}: this site has no test records", ErrorCode.MOD_FAILED_PRECONDITION)
    device = _device()
    metrics = measure(visit.model(message, device), records, device=device)
    return Message(RecordDict({"metrics": MetricRecord({"num-examples": len(records), **metrics})}), reply_to=message)


def _answer(message: Message, context: Context, work: Callable[[_Visit, Message, Context], Message]) -> Message:
    """Do the work; what goes wrong is told to the site's own log, and to the server only as far as it is safe."""
    try:
        visit = _visit(message, context)
    except Exception as error:
        logging.getLogger(__name__).exception("a message could not be read")
        return _error(message, f"{type(error).__name__}: the run-config, node-config or scenario cannot be used at this site")
    try:
        return work(visit, message, context)
    except Exception as error:
        log_error(visit.folder, round=visit.round, error=error)
        told = (
            str(error)
            if isinstance(error, UpdateError)
            else f"round {visit.round}: {type(error).__name__}; see the site's own log"
        )
        return _error(message, told)


def _visit(message: Message, context: Context) -> _Visit:
    run, site = read_run_config(context), int(context.node_config["partition-id"])
    own, noise_seed = context.node_config.get("site-folder"), context.node_config.get("defense-seed", run.scenario.seed)
    config: Mapping[str, Any] = message.content.config_records.get("config", {})
    return _Visit(
        run=run,
        site=site,
        round=int(config.get("server-round", 0)),
        architecture=str(config.get("architecture", "")),
        mu=float(config.get("proximal-mu", 0.0)),
        folder=Path(str(own)) / run.setting.id if own else site_folder(run.out, site),
        noise_seed=int(noise_seed),
    )


def _error(message: Message, reason: str, code: int = ErrorCode.CLIENT_APP_RAISED_EXCEPTION) -> Message:
    return Message(Error(code, reason), reply_to=message)


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")
