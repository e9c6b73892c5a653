"""A scenario over tiny sites, and one site's answer to one message."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from torch import Tensor

from flpriv.clients.app import app
from flpriv.engine.config import RunConfig
from flpriv.engine.inline import run_apps
from flpriv.scenario import Scenario, parse

TINY = Path(__file__).with_name("tiny.py")
Ask = Callable[..., Message]


def tiny_scenario(tables: Mapping[str, Any], *, root: Path) -> Scenario:
    """The scenario in ``tables``, over tiny sites, with the small CNN of width 4 unless they say otherwise."""
    plugins = [str(TINY), *tables.get("plugins", [])]
    sites = {"source": "tiny", **tables.get("sites", {})}
    return parse({"model": {"name": "cnn", "width": 4}, **tables, "plugins": plugins, "sites": sites}, root=root)


def messages(
    scenario: Scenario,
    state: Mapping[str, Tensor],
    *,
    out: Path,
    kind: str = "train",
    setting: str = "none",
    site: int = 0,
    rounds: tuple[int, ...] = (1,),
    config: Mapping[str, Any] | None = None,
    node_config: Mapping[str, Any] | None = None,
) -> list[Message]:
    """The replies of one site to one message a round."""
    replies: list[Message] = []

    def server(grid: Any, context: Context) -> None:
        everyone = [Message(RecordDict(), node, "query") for node in grid.get_node_ids()]
        places = {r.metadata.src_node_id: r.content["site"]["partition-id"] for r in grid.send_and_receive(everyone)}
        node = next(node for node, place in places.items() if place == site)
        for number in rounds:
            content = RecordDict()
            content["arrays"] = ArrayRecord(dict(state))
            content["config"] = ConfigRecord({"server-round": number, **(config or {})})
            replies.extend(grid.send_and_receive([Message(content, node, kind)]))

    run = RunConfig(scenario=scenario, setting=scenario.setting(setting), out=out)
    nodes = scenario.sites.options.get("sites", 3)
    own = {site: dict(node_config or {})}
    run_apps(app, server, nodes=nodes, run_config=run.to_dict(), node_configs=own, seed=scenario.seed)
    return replies


@pytest.fixture
def scenario(tmp_path: Path) -> Callable[..., Scenario]:
    """Makes a scenario over tiny sites from tables given by keyword."""
    return lambda **tables: tiny_scenario(tables, root=tmp_path)


@pytest.fixture
def ask(tmp_path: Path) -> Ask:
    """One site's reply to one message; its folder lies under ``tmp_path / "out"``."""

    def reply(scenario: Scenario, state: Mapping[str, Tensor], **options: Any) -> Message:
        return messages(scenario, state, out=tmp_path / "out", **options)[-1]

    return reply
