"""Threat models grant what they say, and grow stronger in order."""

from __future__ import annotations

import itertools

import pytest

from flpriv.errors import ScenarioError
from flpriv.threat import DESCRIPTIONS, NAMED, Can, capability, spell, threat


def test_named_models_grow_stronger() -> None:
    passive = [granted for granted in NAMED.values() if Can.TAMPER not in granted]
    for weaker, stronger in itertools.pairwise([*passive, NAMED["malicious-server"]]):
        assert weaker in stronger
        assert weaker != stronger
    assert NAMED["malicious-server"] & ~Can.SEE_UPDATES == NAMED["malicious-sums-only"]


@pytest.mark.parametrize(
    ("model", "can", "cannot"),
    [
        ("model-user", Can.SEE_FINAL, Can.SEE_MODELS | Can.SEE_UPDATES | Can.KNOW_LOCAL | Can.KNOW_DEFENSES | Can.TAMPER),
        ("sums-only", Can.SEE_MODELS | Can.KNOW_LOCAL, Can.SEE_UPDATES | Can.TAMPER),
        (
            "honest-but-curious",
            Can.SEE_UPDATES | Can.SEE_MODELS | Can.KNOW_DEFENSES,
            Can.TAMPER | Can.KNOW_LABELS | Can.KNOW_ORDER,
        ),
        ("malicious-server", Can.TAMPER | Can.SEE_UPDATES | Can.KNOW_DEFENSES, Can.KNOW_LABELS | Can.KNOW_ORDER),
        ("malicious-sums-only", Can.TAMPER | Can.SEE_MODELS | Can.KNOW_DEFENSES, Can.SEE_UPDATES | Can.KNOW_LABELS),
    ],
)
def test_what_a_named_model_grants(model: str, can: Can, cannot: Can) -> None:
    granted = threat(model).granted
    assert can in granted
    assert not cannot & granted


def test_grant_and_deny() -> None:
    changed = threat("honest-but-curious", grant=["know-labels", "TAMPER"], deny=["see-updates", "know-order"])
    assert Can.KNOW_LABELS | Can.TAMPER in changed.granted
    assert not changed.granted & (Can.SEE_UPDATES | Can.KNOW_ORDER)
    assert changed.name == "honest-but-curious"


@pytest.mark.parametrize("can", list(Can))
def test_every_capability_is_spelt_and_described(can: Can) -> None:
    assert capability(spell(can)) is can
    assert DESCRIPTIONS[can]
    text = DESCRIPTIONS[can]
    assert (text in threat("model-user", grant=[spell(can)]).lines()) and text not in threat(
        "model-user", deny=[spell(can)]
    ).lines()


def test_spelling_of_several() -> None:
    assert spell(Can.SEE_UPDATES | Can.TAMPER) == "see-updates, tamper"
    assert spell(Can(0)) == ""


def test_unknown_names_are_answered_with_the_near_one() -> None:
    with pytest.raises(ScenarioError, match=r"unknown threat model 'honest'.*known: .*honest-but-curious"):
        threat("honest")
    with pytest.raises(ScenarioError, match="unknown capability 'see-update'; did you mean 'see-updates'"):
        threat("model-user", grant=["see-update"])


def test_the_threat_models_of_the_readme_are_the_ones_there_are() -> None:
    from pathlib import Path

    text = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
    table = text.partition("## Threat models")[2].partition("##")[0]
    assert [line.split("`")[1] for line in table.splitlines() if line.startswith("| `")] == list(NAMED)
