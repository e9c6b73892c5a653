"""Options of secure aggregation, and what a site reads from a request to unmask."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from flwr.common.secure_aggregation import secaggplus_constants as flower

from flpriv.errors import ScenarioError
from flpriv.scenario import Scenario, parse
from flpriv.secure_aggregation import CONFIGS, MODULUS, STATE, Numbers, SecureAggregation, Unmask, unmasking
from flpriv.threat import Can


def made(given: Any, **threat: Any) -> Scenario:
    tables = {"sites": {"source": "phantom"}, "federation": {"secure_aggregation": given}, "threat": threat}
    return parse(tables, root=Path.cwd())


def test_records_are_called_as_flower_calls_them() -> None:
    assert (CONFIGS, STATE) == (flower.RECORD_KEY_CONFIGS, flower.RECORD_KEY_STATE)
    assert {flower.Key.STAGE, flower.Key.ACTIVE_NODE_ID_LIST, flower.Key.DEAD_NODE_ID_LIST} == {
        "stage",
        "active_nids",
        "dead_nids",
    }
    assert flower.Stage.UNMASK == "unmask"


@pytest.mark.parametrize(
    ("options", "nodes", "shares", "threshold"),
    [
        ({}, 2, 2, 2),
        ({}, 4, 4, 3),
        ({}, 10, 10, 7),
        ({"num_shares": 3, "reconstruction_threshold": 2}, 10, 3, 2),
        ({"num_shares": 4}, 10, 5, 3),
        ({"num_shares": 0.5, "reconstruction_threshold": 1.0}, 10, 5, 5),
        ({"num_shares": 0.1}, 10, 10, 7),
        ({"num_shares": 20, "reconstruction_threshold": 0.1}, 10, 10, 2),
    ],
)
def test_shares_and_threshold(options: dict[str, Any], nodes: int, shares: int, threshold: int) -> None:
    secure = SecureAggregation(**options)
    assert (secure.shares(nodes), secure.threshold(nodes)) == (shares, threshold)


@pytest.mark.parametrize("nodes", [2, 3, 4, 31, 100, 1000, 100_000])
def test_sums_fit_the_modulus_and_leave_room_for_weights(nodes: int) -> None:
    steps = SecureAggregation().steps(nodes)
    assert steps * nodes * 16 <= MODULUS < 4 * steps * nodes * 16


def test_the_majority_of_shares_is_the_default() -> None:
    secure = SecureAggregation()
    assert all(2 * secure.threshold(nodes) > secure.shares(nodes) for nodes in range(2, 200))


def test_a_table_a_switch_and_nothing() -> None:
    assert made(True).federation.secure_aggregation == SecureAggregation()
    assert made(False).federation.secure_aggregation is None
    table = {"num_shares": 5, "clipping_range": 1.0, "quantization_range": 2**20}
    found = made(table)
    assert found.federation.secure_aggregation == SecureAggregation(num_shares=5, clipping_range=1.0, quantization_range=2**20)
    for scenario in (made(True), made(False), found):
        assert parse(scenario.tables(), root=Path.cwd()) == scenario


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("yes", "federation.secure_aggregation = 'yes': must be true, false or a table"),
        ({"shares": 3}, "federation.secure_aggregation: unknown option 'shares'"),
        ({"clipping_range": 0}, "federation.secure_aggregation: clipping_range = 0"),
        ({"quantization_range": 1}, "federation.secure_aggregation: quantization_range = 1"),
        ({"reconstruction_threshold": 1.5}, "federation.secure_aggregation: reconstruction_threshold"),
        ({"num_shares": 2}, "federation.secure_aggregation: num_shares"),
    ],
)
def test_a_wrong_option_is_refused_by_name(given: Any, message: str) -> None:
    with pytest.raises(ScenarioError) as refused:
        made(given)
    assert str(refused.value).startswith(message)


@pytest.mark.parametrize(
    ("options", "sites", "message"),
    [
        ({}, 1, "a sum over 1 site hides nothing"),
        ({"reconstruction_threshold": 5}, 4, r"reconstruction_threshold = 5 of 4 shares can never be met"),
        ({"quantization_range": 2**28}, 16, "quantization_range = 268435456: a sum over 16 sites overflows; at most 268435455"),
    ],
)
def test_what_so_many_sites_cannot_run(options: dict[str, Any], sites: int, message: str) -> None:
    with pytest.raises(ScenarioError, match=message):
        SecureAggregation(**options).check(sites)
    SecureAggregation().check(4)


def test_nobody_sees_single_updates() -> None:
    assert Can.SEE_UPDATES not in made(True).threat.granted
    assert Can.SEE_UPDATES in made(False).threat.granted
    with pytest.raises(ScenarioError, match=r"threat\.grant: secure aggregation hides single updates"):
        made(True, model="sums-only", grant=["see-updates"])
    assert Can.SEE_UPDATES in made(False, model="sums-only", grant=["see-updates"]).threat.granted


def test_a_request_as_a_site_sees_it() -> None:
    told = {"sample_num": 5, "share_num": 4, "threshold": 3, "clipping_range": 2.0, "target_range": 64, "max_weight": 10.0}
    state = {"nid": 7, "rd_seed_share_dict:K": [7, 8, 9], "rd_seed_share_dict:V": [b"", b"", b""], **told}
    found = unmasking({"stage": "unmask", "active_nids": [7, 8], "dead_nids": [9]}, state)
    assert found is not None
    assert found.asked == Unmask(alive=(7, 8), dropped=(9,))
    assert (found.node, found.shared, found.nodes) == (7, frozenset((7, 8, 9)), 5)
    assert found.numbers == Numbers(shares=4, threshold=3, clipping_range=2.0, steps=64, max_weight=10.0)
    assert unmasking({"stage": "setup"}, state) is None
