"""The contract of a defence: a Flower mod by itself, and hooks into flpriv's own training loop."""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import ConfigDict

from flpriv.errors import UpdateError
from flpriv.secure_aggregation import CONFIGS, STATE, SecureAggregation, Unmasking, unmasking
from flpriv.seeds import derive
from flpriv.state import State, add, check_like, difference

if TYPE_CHECKING:
    import torch
    from flwr.app import Context, Message
    from torch import nn
    from torch.utils.data import DataLoader

    from flpriv.records import Records
    from flpriv.task import Task

CallNext = Callable[["Message", "Context"], "Message"]
"""The rest of the app, as a Flower mod is handed it."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """The things of a local training loop; a defence takes one and gives one back.

    Args:
        model: in the mode it will be trained in.
        optimizer: over ``model``'s parameters.
        loader: yields ``(images, labels, rows)``; ``rows`` index the site's training records for the witness.
        loss: ``(logits, labels)`` to a scalar mean over the batch.
        finish: called once after the last local step, e.g. to spend privacy budget or unwrap the model.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loader: DataLoader[Any]
    loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
    finish: tuple[Callable[[], None], ...] = ()


@dataclass(frozen=True, kw_only=True)
class Local:
    """Where a defence runs: one site in one round. Nothing of it leaves the site.

    Args:
        site: the site's name, for its own log.
        round: 1, 2, ….
        rng: seeded for this site, round and defence.
        folder: the site's private folder (accountants, logs), or ``None`` where there is none.
        task: the agreed task, where known; a guard rebuilds the agreed architecture from it.
        records: reads the site's own training records, where there are any.
        secure_aggregation: the agreed options of secure aggregation, where known and in use.
        notes: what the defence wants to say about this round (``{"epsilon": 1.3}``); kept with the site's witness.
    """

    site: str
    round: int
    rng: torch.Generator
    folder: Path | None = None
    task: Task | None = None
    records: Callable[[], Records] | None = None
    secure_aggregation: SecureAggregation | None = None
    notes: dict[str, float | str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Why a site does not take part in this round: ``reason`` in one sentence, safe to send to the server."""

    reason: str


class Defense(ABC):
    """A defence: a frozen dataclass whose fields are its options. A plugin overrides the hooks it needs.

    An instance is a Flower mod: ``ClientApp(mods=[TopK(keep=0.01)])`` protects any app's updates (what acts on ``"loop"`` or
    ``"data"`` needs flpriv's own loop). It acts on training messages alone, and on parameters, never on counters or running
    statistics.

    Class attributes: ``name`` (as in scenarios), ``acts_on``, ``paper``.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")

    name: ClassVar[str]
    acts_on: ClassVar[Literal["update", "loop", "data", "received", "protocol"]]
    paper: ClassVar[str]

    def architecture(self, model: nn.Module) -> nn.Module:
        """The model the whole federation agrees on under this defence (BatchNorm replaced, a bottleneck added)."""
        return model

    def inspect(self, received: State, *, local: Local) -> Refusal | None:
        """Judge the model received before any training on it."""
        return None

    def unmask(self, request: Unmasking, *, local: Local) -> Refusal | None:
        """Under secure aggregation, judge which shares the server asks for; only where a defence acts on ``"protocol"``."""
        return None

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        """Reshape training."""
        return loop

    def protect(self, update: State, *, local: Local) -> State:
        """Alter the update (parameters only) before it leaves; keys, shapes and dtypes stay."""
        return update

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        """The Flower mod.

        A defence that acts inside local training cannot be reached from a mod: as one it answers with an error, so that nobody
        takes it for protection.
        """
        if self.acts_on in ("loop", "data") and message.metadata.message_type.split(".")[0] == "train":
            return _refused(message, f"{self.name}: acts inside local training, where no mod reaches; use flpriv's own ClientApp")
        return guard((self,), message, context, call_next, local=_anywhere(message, context, self))


def guard(
    defenses: tuple[Defense, ...], message: Message, context: Context, call_next: CallNext, *, local: Callable[[int], Local]
) -> Message:
    """Run ``inspect`` before and ``protect`` after ``call_next``; the first defence touches the update first.

    ``local`` gives each defence, by position, its surroundings. The first refusal ends the round for this site with an
    error reply that carries the reason. A model that cannot be told from its message never leaves unprotected: more than one
    ArrayRecord, or other layers than were sent, end in an error reply too. So does a defence that stands before Flower's mod of
    secure aggregation, where updates are masked already; those that act on the protocol stand there and nowhere else.
    """
    from flwr.app import ArrayRecord

    if not defenses or message.metadata.message_type.split(".")[0] != "train" or not message.has_content():
        return call_next(message, context)
    if CONFIGS in message.content.config_records:
        reason = _protocol_reason(defenses, message, context, local)
        return call_next(message, context) if reason is None else _refused(message, reason)
    received = {key: record.to_torch_state_dict() for key, record in message.content.array_records.items()}
    for place, defense in enumerate(defenses if len(received) == 1 else ()):
        if refusal := defense.inspect(next(iter(received.values())), local=local(place)):
            return _refused(message, f"{defense.name}: {refusal.reason}")
    reply = call_next(message, context)
    if reply.has_error() or not reply.content.array_records:
        return reply
    if len(received) != 1 or len(reply.content.array_records) != 1:
        return _refused(message, f"{defenses[0].name}: needs one ArrayRecord in the message and one in the reply")
    (sent,) = received.values()
    ((name, record),) = reply.content.array_records.items()
    returned = record.to_torch_state_dict()
    try:
        check_like(returned, sent, who=f"{defenses[0].name}: reply")
    except UpdateError as error:
        return _refused(message, str(error))
    before = difference(returned, sent)
    update: State = before
    for place, defense in enumerate(defenses):
        update = defense.protect(update, local=local(place))
    if update is not before:
        reply.content[name] = ArrayRecord(add({**returned, **{key: sent[key] for key in update}}, update))
    return reply


def _protocol_reason(
    defenses: tuple[Defense, ...], message: Message, context: Context, local: Callable[[int], Local]
) -> str | None:
    """Why a message of secure aggregation is not answered, if it is not."""
    request = unmasking(message.content.config_records[CONFIGS], context.state.config_records.get(STATE, {}))
    for place, defense in enumerate(defenses):
        if defense.acts_on != "protocol":
            return f"{defense.name}: stands before the mod of secure aggregation and cannot see the update; put it after"
        if request is not None and (refusal := defense.unmask(request, local=local(place))):
            return f"{defense.name}: {refusal.reason}"
    return None


def _refused(message: Message, reason: str) -> Message:
    from flwr.app import Error, Message
    from flwr.common.constant import ErrorCode

    return Message(Error(ErrorCode.MOD_FAILED_PRECONDITION, reason), reply_to=message)


def _anywhere(message: Message, context: Context, defense: Defense) -> Callable[[int], Local]:
    """Surroundings in an app that is not ours.

    The round comes from the message. Noise comes from ``defense-seed`` in the site's own node config where that is set, else
    from the operating system: whoever can compute the seed can take the noise off again, so it never follows from what the
    server knows.
    """
    import secrets

    import torch

    configs = message.content.config_records.values() if message.has_content() else ()
    server_round = next((config["server-round"] for config in configs if "server-round" in config), 0)
    number = server_round if isinstance(server_round, int) else 0
    given = context.node_config.get("defense-seed")
    seed = secrets.randbits(63) if given is None else derive(int(given), number, defense.name)
    local = Local(site=f"node {context.node_id}", round=number, rng=torch.Generator().manual_seed(seed))
    return lambda _: local


def with_seed(local: Local, seed: int) -> Local:
    """The same surroundings with a fresh generator."""
    import torch

    return replace(local, rng=torch.Generator().manual_seed(seed))
