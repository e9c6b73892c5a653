"""Requests to unmask that a site refuses, and its mod in a Flower app that is not flpriv's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from flwr.app import Context, Message
from flwr.client.mod import secaggplus_mod
from flwr.clientapp import ClientApp
from flwr.common import Code, FitRes, Status, ndarrays_to_parameters
from flwr.compat.common.recorddict_compat import fitres_to_recorddict
from flwr.serverapp import Grid

from flpriv.defense import Defense, Local
from flpriv.defenses.top_k import TopK
from flpriv.defenses.unmask_check import UnmaskCheck
from flpriv.engine.inline import run_apps
from flpriv.secure_aggregation import SecureAggregation, Unmask, Unmasking

LOCAL = Local(site="A", round=1, rng=torch.Generator())
NODES = (1, 2, 3, 4)


AGREED = SecureAggregation(reconstruction_threshold=3, clipping_range=2.0)


def judge(
    alive: tuple[int, ...],
    dropped: tuple[int, ...] = (),
    *,
    told: SecureAggregation = AGREED,
    local: Local = LOCAL,
    nodes: int = 4,
    **options: Any,
) -> str:
    request = Unmasking(
        node=1, asked=Unmask(alive=alive, dropped=dropped), shared=frozenset(NODES), nodes=nodes, numbers=told.numbers(nodes)
    )
    refusal = UnmaskCheck(**options).unmask(request, local=local)
    return "" if refusal is None else refusal.reason


@pytest.mark.parametrize("dropped", [(), (2,), (4,)])
def test_honest_requests_are_answered(dropped: tuple[int, ...]) -> None:
    known = replace(LOCAL, secure_aggregation=AGREED)
    assert judge(tuple(node for node in NODES if node not in dropped), dropped, local=known) == ""


@pytest.mark.parametrize(
    ("alive", "dropped", "reason"),
    [
        ((1, 2, 3, 4), (2,), "1 node is named both alive and dropped"),
        ((1, 2, 3, 4), (2, 3), "2 nodes are named both alive and dropped"),
        ((1, 2, 3, 4, 4), (), "names a node twice"),
        ((1, 2, 3), (4, 4), "names a node twice"),
        ((2, 3, 4), (1,), "calls this site dropped"),
        ((1, 2, 3, 4, 5), (), "1 node is named in the unmask request that shared no secret"),
        ((1, 2, 3, 4), (5, 6), "2 nodes are named in the unmask request that shared no secret"),
        ((1, 2, 3), (), "1 node is left out of the unmask request"),
        ((1, 2), (3, 4), "2 nodes are alive, fewer than the threshold of 3"),
    ],
)
def test_other_requests_are_refused(alive: tuple[int, ...], dropped: tuple[int, ...], reason: str) -> None:
    assert reason in judge(alive, dropped)


def test_a_threshold_of_half_the_shares_is_refused_unless_told_otherwise() -> None:
    half = replace(AGREED, reconstruction_threshold=2)
    assert "a threshold of 2 of 4 shares lets the server ask one half" in judge(NODES, told=half)
    assert judge(NODES, told=half, majority=False) == ""
    assert judge(NODES, nodes=5) == ""


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"reconstruction_threshold": 4}, "the server announced threshold = 4, agreed is 3"),
        ({"clipping_range": 0.01}, "the server announced clipping_range = 0.01, agreed is 2"),
        ({"quantization_range": 2**20}, "the server announced steps = 1.04858e+06, agreed is 6.71089e+07"),
        ({"max_weight": 10}, "the server announced max_weight = 10, agreed is 1000"),
    ],
)
def test_numbers_other_than_agreed_are_refused_where_those_are_known(change: dict[str, Any], reason: str) -> None:
    told = replace(AGREED, **change)
    assert judge((1, 2, 3, 4), told=told) == ""
    assert judge((1, 2, 3, 4), told=told, local=replace(LOCAL, secure_aggregation=AGREED)) == reason
    assert judge((1, 2, 3, 4), local=replace(LOCAL, secure_aggregation=AGREED)) == ""


def fit(message: Message, context: Context) -> Message:
    result = FitRes(Status(Code.OK, ""), ndarrays_to_parameters([torch.tensor([0.5, -0.25]).numpy()]), 10, {})
    return Message(fitres_to_recorddict(result, keep_input=True), reply_to=message)


def as_mod(defense: Defense) -> Callable[..., Message]:
    return defense


def protocol(*mods: Callable[..., Message], dropped: int) -> list[Message]:
    """The replies of three nodes to Flower's own four stages, the last naming ``dropped`` nodes on both sides."""
    app = ClientApp(mods=list(mods))
    app.train()(fit)
    replies: list[Message] = []

    def serve(grid: Grid, context: Context) -> None:
        nodes = list(grid.get_node_ids())

        def ask(configs: dict[int, dict[str, Any]]) -> dict[int, Any]:
            from flwr.app import ConfigRecord, RecordDict

            sent = [Message(RecordDict({"secaggplus_configs": ConfigRecord(configs[node])}), node, "train") for node in nodes]
            replies[:] = grid.send_and_receive(sent)
            good = [reply for reply in replies if reply.has_content()]
            return {reply.metadata.src_node_id: reply.content.config_records["secaggplus_configs"] for reply in good}

        setup = {
            "sample_num": 3,
            "share_num": 3,
            "threshold": 2,
            "clipping_range": 8.0,
            "target_range": 2**20,
            "mod_range": 2**32,
        }
        keys = ask({node: {"stage": "setup", "max_weight": 20.0, **setup} for node in nodes})
        if len(keys) < len(nodes):
            return
        named = {str(node): [told["pk1"], told["pk2"]] for node, told in keys.items()}
        shares = ask({node: {"stage": "share_keys", **named} for node in nodes})
        secrets: dict[int, list[tuple[int, bytes]]] = {node: [] for node in nodes}
        for node, told in shares.items():
            for other, text in zip(told["dsts"], told["ctxts"], strict=True):
                secrets[other].append((node, text))
        ask(
            {
                node: {
                    "stage": "collect_masked_vectors",
                    "srcs": [one for one, _ in secrets[node]],
                    "ctxts": [text for _, text in secrets[node]],
                }
                for node in nodes
            }
        )
        assert all(reply.has_content() for reply in replies)
        ask({node: {"stage": "unmask", "active_nids": nodes, "dead_nids": nodes[:dropped]} for node in nodes})

    run_apps(app, serve, nodes=3, run_config={}, seed=3)
    return replies


def test_in_an_app_of_flower_it_stands_before_the_mod() -> None:
    honest = protocol(as_mod(UnmaskCheck()), secaggplus_mod, dropped=0)
    assert all(reply.has_content() for reply in honest)
    unguarded = protocol(secaggplus_mod, dropped=1)
    told = [reply.content.config_records["secaggplus_configs"]["shares"] for reply in unguarded]
    assert [len(shares) for shares in told if isinstance(shares, list)] == [4] * len(unguarded)
    refused = protocol(as_mod(UnmaskCheck()), secaggplus_mod, dropped=1)
    assert {reply.error.reason for reply in refused} == {
        "unmask-check: 1 node is named both alive and dropped; the answer would open single updates"
    }


def test_a_defence_of_updates_before_the_mod_refuses_rather_than_let_them_pass() -> None:
    replies = protocol(as_mod(TopK(keep=0.5)), secaggplus_mod, dropped=0)
    assert all("top-k: stands before the mod of secure aggregation" in str(reply.error.reason) for reply in replies)
