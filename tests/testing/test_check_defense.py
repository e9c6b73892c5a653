"""The suite lets sound defences pass and names what is wrong with the others."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pytest
import torch
from flwr.app import ArrayRecord, Context, Error, Message
from torch import nn

from flpriv.defense import CallNext, Defense, Local, Loop, Refusal
from flpriv.state import State
from flpriv.testing import check_defense


@dataclass(frozen=True, kw_only=True)
class Sound(Defense):
    """Adds seeded noise.

    Args:
        scale: of the noise.
    """

    name: ClassVar[str] = "sound"
    acts_on: ClassVar[Literal["update"]] = "update"
    paper: ClassVar[str] = "none"
    scale: float = 0.1

    def protect(self, update: State, *, local: Local) -> State:
        return {k: v + self.scale * torch.randn(v.shape, generator=local.rng).to(v.dtype) for k, v in update.items()}


def faulty(cls: type[Any]) -> type[Any]:
    cls.__doc__ = f"{cls.__doc__}\n\nscale: of the noise."
    return dataclass(frozen=True, kw_only=True)(cls)


@faulty
class Unseeded(Sound):
    """Draws from the global random state."""

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value + torch.randn_like(value) for key, value in update.items()}


@faulty
class InPlace(Sound):
    """Works on what it is given."""

    def protect(self, update: State, *, local: Local) -> State:
        for value in update.values():
            value.mul_(0.5).add_(0.1)
        return update


@faulty
class Dropping(Sound):
    """Leaves a layer out."""

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value for key, value in update.items() if value.ndim > 1}


@faulty
class Halving(Sound):
    """Changes the type."""

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value.half() for key, value in update.items()}


@faulty
class Dividing(Sound):
    """Divides by the norm."""

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value / value.norm() for key, value in update.items()}


@faulty
class Paranoid(Sound):
    """Refuses everything."""

    def inspect(self, received: State, *, local: Local) -> Refusal | None:
        return Refusal(reason="no")


@faulty
class Wrapping(Sound):
    """Leaves its hands in the model."""

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        loop.model.register_buffer("mark", torch.zeros(1))
        return loop


@faulty
class Blunting(Sound):
    """Never lets a step be taken."""

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        return replace(loop, optimizer=torch.optim.SGD(loop.model.parameters(), lr=0.0))


@faulty
class Rowless(Sound):
    """Does not tell the rows used."""

    def prepare(self, loop: Loop, *, local: Local) -> Loop:
        class Loader:
            def __iter__(self) -> Iterator[Any]:
                return ((images, labels, rows + 1000) for images, labels, rows in loop.loader)

        return replace(loop, loader=Loader())  # type: ignore[arg-type]


@faulty
class Widening(Sound):
    """Adds a class."""

    def architecture(self, model: nn.Module) -> nn.Module:
        return nn.Sequential(model, nn.Linear(3, 4))


@faulty
class Everywhere(Sound):
    """Noises evaluation, counters and all."""

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        reply = call_next(message, context)
        if reply.has_content():
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            reply.content["arrays"] = ArrayRecord({key: value + 1 for key, value in state.items()})
        return reply


@faulty
class Counting(Sound):
    """Noises counters too."""

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        reply = super().__call__(message, context, call_next)
        if reply.has_content() and message.metadata.message_type == "train":
            state = reply.content.array_records["arrays"].to_torch_state_dict()
            reply.content["arrays"] = ArrayRecord({key: value + 1 for key, value in state.items()})
        return reply


@faulty
class Pretending(Sound):
    """Acts on the loop and lets updates pass as a mod."""

    acts_on: ClassVar[Literal["loop"]] = "loop"  # type: ignore[assignment]

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        return call_next(message, context)


@faulty
class Swallowing(Sound):
    """Rewrites error replies."""

    def __call__(self, message: Message, context: Context, call_next: CallNext) -> Message:
        reply = super().__call__(message, context, call_next)
        return Message(Error(1, "something"), reply_to=message) if reply.has_error() else reply


def test_a_sound_defense_passes() -> None:
    check_defense(Sound())


@pytest.mark.parametrize(
    ("cls", "fault"),
    [
        (Unseeded, "draw from local.rng"),
        (InPlace, "alters the update"),
        (Dropping, "must keep keys"),
        (Halving, "must keep keys, shapes and dtypes"),
        (Dividing, "NaN or infinite"),
        (Paranoid, "refuses an honest model: no"),
        (Wrapping, "leave the model with the keys"),
        (Blunting, "training changes nothing"),
        (Rowless, r"\(images, labels, rows\)"),
        (Widening, "shape of the logits"),
        (Everywhere, "leave evaluation alone"),
        (Counting, "running statistics and counters alone"),
        (Pretending, "a mod cannot reach local training"),
        (Swallowing, "hand on error replies"),
    ],
)
def test_what_is_wrong_is_named(cls: type[Defense], fault: str) -> None:
    with pytest.raises(AssertionError, match=fault):
        check_defense(cls())
