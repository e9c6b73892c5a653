"""Whether a defence keeps its contract: in flpriv's own loop, and as a mod in a Flower app it has never seen."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

from flpriv.claim import Goal
from flpriv.defense import Defense, Local, Loop
from flpriv.records import Records
from flpriv.state import State, difference, is_parameter
from flpriv.task import Task
from flpriv.testing.federation import glass
from flpriv.testing.plugins import check_plugin, global_seed, require, same

if TYPE_CHECKING:
    from flwr.app import Context, Message, RecordDict
    from flwr.serverapp import Grid

    from flpriv.defense import CallNext


ACTS_ON = ("update", "loop", "data", "received", "protocol")


def check_defense(defense: Defense) -> None:
    """Check a defence.

    It must be a frozen dataclass with documented options and name its paper; keep keys, shapes and dtypes of every update,
    a zero one included, and leave the one it is given unaltered; draw from its seed alone; accept an honest model; train
    through its own architecture to finite weights under unchanged keys; and, as a mod in a plain Flower ClientApp, leave
    running statistics, counters, metrics, evaluation and error replies exactly as they are. One that acts on ``"loop"`` or
    ``"data"`` must refuse to be a mod.

    Args:
        defense: with the options to check it with.

    Raises:
        AssertionError: saying what is wrong.
    """
    name = check_plugin(defense, facts=("acts_on", "paper"))
    require(defense.acts_on in ACTS_ON, f"{name}: acts_on = {defense.acts_on!r} is unknown")
    with tempfile.TemporaryDirectory() as folder:
        site = _Site(defense=defense, folder=Path(folder))
        _check_protect(site)
        _check_inspect(site)
        _check_loop(site)
        _check_mod(defense)


class _Site:
    """A site of the glass federation."""

    def __init__(self, *, defense: Defense, folder: Path) -> None:
        made = glass(Goal.ATTRIBUTE)
        self.defense = defense
        self.task: Task = made.capture.task
        self.records: Records = next(iter(made.truth.used.values()))
        self.models: tuple[State, ...] = made.capture.models
        self._folder, self._visits = folder, 0

    def local(self, *, seed: int = 0) -> Local:
        """Surroundings, each time with a folder of their own."""
        self._visits += 1
        folder = self._folder / str(self._visits)
        folder.mkdir()
        rng = torch.Generator().manual_seed(seed)
        return Local(site="A", round=1, rng=rng, folder=folder, task=self.task, records=lambda: self.records)


def _check_protect(site: _Site) -> None:
    name = site.defense.name
    rng = torch.Generator().manual_seed(5)
    update = {
        "conv.weight": torch.randn(6, 2, 3, 3, generator=rng),
        "norm.weight": torch.randn(6, generator=rng),
        "dense.weight": torch.randn(4, 40, generator=rng, dtype=torch.float64),
        "scale": torch.randn((), generator=rng),
    }
    for case in (update, {key: torch.zeros_like(value) for key, value in update.items()}):
        before = {key: value.clone() for key, value in case.items()}
        with global_seed(1):
            one = site.defense.protect(case, local=site.local(seed=3))
        with global_seed(2):
            two = site.defense.protect(case, local=site.local(seed=3))
        require(_equal(case, before), f"{name}: protect() alters the update it is given; return a new one")
        require(_like(one, case), f"{name}: protect() must keep keys, shapes and dtypes")
        require(
            all(bool(torch.isfinite(value).all()) for value in one.values()), f"{name}: protect() gives NaN or infinite values"
        )
        require(_equal(one, two), f"{name}: equal seeds give different updates; draw from local.rng alone")


def _check_inspect(site: _Site) -> None:
    for state in (site.models[0], site.models[-1]):
        before = {key: value.clone() for key, value in state.items()}
        refusal = site.defense.inspect(state, local=site.local())
        require(refusal is None, f"{site.defense.name}: refuses an honest model: {refusal.reason if refusal else ''}")
        require(_equal(state, before), f"{site.defense.name}: inspect() alters the model it is given")


def _check_loop(site: _Site) -> None:
    name = site.defense.name

    def trained(at_large: int) -> tuple[State, State]:
        model = site.defense.architecture(site.task.build())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with global_seed(at_large):
            loop = site.defense.prepare(_loop(model, site.records), local=site.local(seed=3))
            for images, labels, rows in loop.loader:
                require(
                    len(images) == len(labels) == len(rows) and all(0 <= row < len(site.records) for row in rows.tolist()),
                    f"{name}: the loader must yield (images, labels, rows) of the site's records",
                )
                loop.optimizer.zero_grad()
                torch.autograd.backward(loop.loss(loop.model(images), labels))
                loop.optimizer.step()
            for finish in loop.finish:
                finish()
        return before, model.state_dict()

    logits = site.defense.architecture(site.task.build()).eval()(site.records.images[:2])
    require(logits.shape == (2, len(site.task.classes)), f"{name}: architecture() must keep the shape of the logits")
    before, after = trained(1)
    require(_like(after, before), f"{name}: training must leave the model with the keys, shapes and dtypes it came with")
    require(
        all(bool(torch.isfinite(value).all()) for value in difference(after, before).values()), f"{name}: training ends in NaN"
    )
    require(not _equal(after, before), f"{name}: training changes nothing")
    require(_equal(trained(2)[1], after), f"{name}: equal seeds train different models; draw from local.rng alone")


def _loop(model: nn.Module, records: Records) -> Loop:
    data = TensorDataset(records.images, records.labels, torch.arange(len(records)))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    return Loop(model=model.train(), optimizer=optimizer, loader=DataLoader(data, batch_size=8), loss=cross_entropy)


SENT = {
    "conv.weight": torch.linspace(-1, 1, 3 * 2 * 3 * 3).reshape(3, 2, 3, 3),
    "norm.weight": torch.ones(3),
    "norm.running_mean": torch.zeros(3),
    "norm.running_var": torch.ones(3),
    "norm.num_batches_tracked": torch.tensor(4),
    "head.bias": torch.tensor([0.5, -0.5], dtype=torch.float64),
}
"""A model received by an app that is not flpriv's."""


def _returned() -> dict[str, Tensor]:
    done = {key: value + 0.01 if is_parameter(key, value) else value + 1 for key, value in SENT.items()}
    return done | {"norm.running_var": torch.tensor([1e-6, 2.0, 3.0])}


def _check_mod(defense: Defense) -> None:
    """The defence in ``ClientApp(mods=[defense])``, spoken to as a strategy would."""
    replies = _converse(defense)
    name, plain = defense.name, _returned()
    evaluated = replies["evaluate"].content
    require(
        _equal(evaluated.array_records["arrays"].to_torch_state_dict(), plain)
        and dict(evaluated.metric_records["metrics"]) == {"num-examples": 7, "loss": 0.25},
        f"{name}: as a mod it must leave evaluation alone",
    )
    trained = replies["train"]
    if defense.acts_on in ("loop", "data"):
        require(trained.has_error(), f"{name}: a mod cannot reach local training; it must say so and not let an update pass")
        return
    require(
        trained.has_content(),
        f"{name}: as a mod it answers a training message with an error: {trained.error.reason if trained.has_error() else ''}",
    )
    back = trained.content.array_records["arrays"].to_torch_state_dict()
    require(list(back) == list(plain) and _like(back, plain), f"{name}: as a mod it must keep keys, shapes and dtypes")
    for key, value in plain.items():
        if not is_parameter(key, value):
            require(same(back[key], value), f"{name}: as a mod it must leave running statistics and counters alone ({key})")
    metrics = dict(trained.content.metric_records["metrics"])
    require(metrics == {"num-examples": 7, "loss": 0.25}, f"{name}: as a mod it must leave the metrics alone")
    failed = replies["train.failing"]
    require(
        failed.has_error() and (failed.error.code, failed.error.reason) == (7, "no data"),
        f"{name}: as a mod it must hand on error replies",
    )


def _converse(defense: Defense) -> Mapping[str, Message]:
    """What a plain app with this mod answers to one message of each kind."""
    from flwr.app import ArrayRecord, ConfigRecord, Error, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from flpriv.engine.inline import run_apps

    app = ClientApp(mods=[_as_mod(defense)])

    def answer(message: Message, context: Context) -> Message:
        metrics = MetricRecord({"num-examples": 7, "loss": 0.25})
        return Message(RecordDict({"arrays": ArrayRecord(_returned()), "metrics": metrics}), reply_to=message)

    def fail(message: Message, context: Context) -> Message:
        return Message(Error(7, "no data"), reply_to=message)

    app.train()(answer)
    app.evaluate()(answer)
    app.train("failing")(fail)

    def content() -> RecordDict:
        return RecordDict({"arrays": ArrayRecord(SENT), "config": ConfigRecord({"server-round": 1})})

    replies: dict[str, Message] = {}

    def serve(grid: Grid, context: Context) -> None:
        (node,) = grid.get_node_ids()
        for kind in ("train", "evaluate", "train.failing"):
            (replies[kind],) = grid.send_and_receive([Message(content(), node, kind)])

    run_apps(app, serve, nodes=1, run_config={}, node_configs={0: {"defense-seed": 1}})
    return replies


def _as_mod(defense: Defense) -> Callable[[Message, Context, CallNext], Message]:
    return defense


def _like(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(
        one[key].shape == value.shape and one[key].dtype == value.dtype for key, value in two.items()
    )


def _finite(state: State) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in state.values())


def _equal(one: State, two: State) -> bool:
    return one.keys() == two.keys() and all(same(one[key], value) for key, value in two.items())
