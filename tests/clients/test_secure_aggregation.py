"""A site under secure aggregation: masked updates or none at all."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Message

from flpriv import data
from flpriv.scenario import Scenario


def test_a_plain_training_message_is_not_answered(scenario: Callable[..., Scenario], ask: Callable[..., Message]) -> None:
    made = scenario(federation={"secure_aggregation": True})
    reply = ask(made, data.task(made).build().state_dict())
    assert reply.has_error()
    assert reply.error.reason == "this site sends its update masked or not at all, and the message is not of secure aggregation"


def test_evaluation_is_answered_as_ever(scenario: Callable[..., Scenario], ask: Callable[..., Message]) -> None:
    made = scenario(federation={"secure_aggregation": True})
    reply = ask(made, data.task(made).build().state_dict(), kind="evaluate")
    assert reply.has_content()
