"""The mod that every defence is: what passes, what is changed, and what never leaves a site."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from flpriv.defense import Defense, Local, Refusal, guard
from flpriv.defenses.dp_sgd import DPSGD
from flpriv.defenses.gaussian import Gaussian
from flpriv.engine.inline import run_apps
from flpriv.state import State

SENT = {"w": torch.zeros(3), "norm.running_mean": torch.zeros(2), "count": torch.tensor(1)}
RETURNED = {"w": torch.tensor([3.0, 0.0, 4.0]), "norm.running_mean": torch.ones(2), "count": torch.tensor(5)}


@dataclass(frozen=True, kw_only=True)
class Double(Defense):
    """Doubles the update and refuses models whose first weight is ``bad``."""

    name: ClassVar[str] = "double"
    acts_on: ClassVar[Literal["update"]] = "update"
    bad: float = 9.0

    def inspect(self, received: State, *, local: Local) -> Refusal | None:
        return Refusal(reason="first weight is bad") if float(received["w"][0]) == self.bad else None

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value * 2 for key, value in update.items()}


@dataclass(frozen=True, kw_only=True)
class AddOne(Double):
    """Adds one to the update."""

    name: ClassVar[str] = "add-one"

    def protect(self, update: State, *, local: Local) -> State:
        return {key: value + 1 for key, value in update.items()}


def talk(
    *mods: Callable[..., Message],
    sent: Mapping[str, State] = {"arrays": SENT},
    returned: Mapping[str, State] = {"arrays": RETURNED},
    node_config: Mapping[str, Any] | None = None,
) -> Message:
    app = ClientApp(mods=list(mods))

    @app.train()
    def train(message: Message, context: Context) -> Message:
        back = {key: ArrayRecord(dict(state)) for key, state in returned.items()}
        return Message(RecordDict({**back, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    replies: list[Message] = []

    def serve(grid: Any, context: Context) -> None:
        records = {key: ArrayRecord(dict(state)) for key, state in sent.items()}
        content = RecordDict({**records, "config": ConfigRecord({"server-round": 2})})
        replies.extend(grid.send_and_receive([Message(content, grid.get_node_ids()[0], "train")]))

    run_apps(app, serve, nodes=1, run_config={}, node_configs={0: node_config or {}})
    return replies[0]


def state(reply: Message) -> dict[str, Tensor]:
    done: dict[str, Tensor] = reply.content.array_records["arrays"].to_torch_state_dict()
    return done


def test_the_update_is_changed_and_the_buffers_are_not() -> None:
    back = state(talk(Double()))
    assert torch.equal(back["w"], torch.tensor([6.0, 0.0, 8.0]))
    assert torch.equal(back["norm.running_mean"], torch.ones(2)) and int(back["count"]) == 5


def test_an_identity_returns_the_same_bits() -> None:
    returned = {"w": torch.tensor([0.1, 1e-8, 3.3])}
    sent = {"w": torch.full((3,), 0.7)}
    reply = talk(Gaussian(noise_multiplier=0, max_grad_norm=1e9), sent={"arrays": sent}, returned={"arrays": returned})
    assert torch.equal(state(reply)["w"], returned["w"])


def test_the_first_of_a_stack_touches_the_update_first() -> None:
    def stack(*defenses: Defense) -> Callable[..., Message]:
        def mod(message: Message, context: Context, call_next: Callable[..., Message]) -> Message:
            local = Local(site="A", round=1, rng=torch.Generator())
            return guard(defenses, message, context, call_next, local=lambda _: local)

        return mod

    assert torch.equal(state(talk(stack(Double(), AddOne())))["w"], torch.tensor([7.0, 1.0, 9.0]))
    assert torch.equal(state(talk(stack(AddOne(), Double())))["w"], torch.tensor([8.0, 2.0, 10.0]))
    assert torch.equal(state(talk(stack()))["w"], RETURNED["w"])
    # Flower's own order: the first mod is outermost.
    assert torch.equal(state(talk(Double(), AddOne()))["w"], torch.tensor([8.0, 2.0, 10.0]))


def test_a_refusal_ends_the_round_for_this_site() -> None:
    reply = talk(Double(bad=0.0))
    assert reply.has_error() and reply.error.reason == "double: first weight is bad"


@pytest.mark.parametrize(
    ("sent", "returned", "reason"),
    [
        ({"arrays": SENT}, {"arrays": RETURNED, "more": RETURNED}, "one ArrayRecord"),
        ({"arrays": SENT, "more": SENT}, {"arrays": RETURNED}, "one ArrayRecord"),
        ({}, {"arrays": RETURNED}, "one ArrayRecord"),
        ({"arrays": SENT}, {"arrays": RETURNED | {"extra": torch.ones(1)}}, "'extra' is not part of the model"),
        ({"arrays": SENT}, {"arrays": {"w": torch.ones(3)}}, "'count' is missing"),
        ({"arrays": SENT}, {"arrays": RETURNED | {"w": torch.ones(4)}}, r"'w' has shape \(4,\)"),
    ],
)
def test_what_cannot_be_defended_does_not_leave(sent: Mapping[str, State], returned: Mapping[str, State], reason: str) -> None:
    reply = talk(Double(), sent=sent, returned=returned)
    assert reply.has_error()
    with pytest.raises(AssertionError, match=reason):
        raise AssertionError(reply.error.reason)


def test_a_reply_without_a_model_passes() -> None:
    assert talk(Double(), returned={}).has_content()


def test_noise_in_a_foreign_app_is_not_computable_by_the_server() -> None:
    noise = Gaussian(noise_multiplier=1.0)
    assert not torch.equal(state(talk(noise))["w"], state(talk(noise))["w"])
    own = [state(talk(noise, node_config={"defense-seed": seed}))["w"] for seed in (5, 5, 6)]
    assert torch.equal(own[0], own[1]) and not torch.equal(own[0], own[2])


def test_what_acts_inside_training_is_no_mod() -> None:
    reply = talk(DPSGD())
    assert reply.has_error() and "acts inside local training" in str(reply.error.reason)
