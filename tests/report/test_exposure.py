"""The exposure table: rows in the paper's order and words, what was not run or failed, and when there is none."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from flpriv.claim import Goal
from flpriv.finding import Confusion, Finding, Metric, SettingResult, Verdict
from flpriv.report.exposure import exposure, in_words
from flpriv.report.page import points, render, under

STACKS = ("none", "synthetic", "untrained", "siloed", "centralised+dp", "centralised", "iid", "dp")


def found(attack: str, stack: str, accuracy: float) -> Finding:
    headline = Metric(name="accuracy", value=accuracy, low=accuracy - 0.1, high=accuracy + 0.1, n=80, null=0.5)
    lift = Metric(name="lift over the best baseline", value=accuracy - 0.5, low=accuracy - 0.6, high=accuracy - 0.4, n=80)
    counts = np.array([[30, 10], [10, 30]])
    matrix = Confusion(classes=("F", "M"), counts=counts, accuracy=accuracy, baselines={"majority class": 0.5, "pixels": 0.45})
    return Finding(
        attack=attack,
        name="site-inference",
        goal=Goal.ATTRIBUTE,
        setting=stack,
        defense=stack,
        headline=headline,
        metrics=(headline, lift, Metric(name="macro F1", value=accuracy / 2, n=80)),
        confusion=matrix,
    )


def trained(stack: str, auroc: float) -> SettingResult:
    names = {"siloed": ("north",), "centralised": ("all sites",)}.get(stack, ("north", "south"))
    utility = (Metric(name="balanced accuracy", value=0.7, n=9), Metric(name="AUROC", value=auroc, low=0.6, high=0.95, n=9))
    return SettingResult(id=stack, defense=stack, trap="", recipe="", rounds=1, utility=utility, nodes=names)


def made(small: Verdict, *findings: Finding) -> Verdict:
    return replace(small, findings=findings, settings=tuple(trained(stack, 0.8) for stack in STACKS))


def test_rows_stand_as_in_the_paper(small: Verdict) -> None:
    verdict = made(small, *(found(attack, stack, 0.7) for attack in ("site", "sex") for stack in STACKS))
    table = exposure(verdict)
    assert table is not None
    assert [row.name for row in table.rows] == [
        "Centralised",
        "Centralised + dp",
        "Siloed (north)",
        "Federated, IID",
        "Federated, own sites",
        "+ synthetic",
        "+ dp",
        "Untrained",
    ]
    assert (table.attacks, table.counts) == (("site", "sex"), ((2, 80), (2, 80)))
    assert [(each.name, each.accuracies) for each in table.baselines] == [
        ("majority class", (0.5, 0.5)),
        ("pixels", (0.45, 0.45)),
    ]


def test_every_number_stands_at_its_place(small: Verdict) -> None:
    verdict = made(
        small, found("site", "none", 0.7), found("site", "iid", 0.62), found("sex", "none", 0.55), found("sex", "iid", 0.51)
    )
    table = exposure(verdict)
    assert table is not None
    cells = {(row.name, attack): cell for row in table.rows for attack, cell in zip(table.attacks, row.cells, strict=True)}
    assert {key: cell.accuracy and cell.accuracy.value for key, cell in cells.items()} == {
        ("Federated, IID", "site"): 0.62,
        ("Federated, own sites", "site"): 0.7,
        ("Federated, IID", "sex"): 0.51,
        ("Federated, own sites", "sex"): 0.55,
    }
    assert all(cell.f1 and cell.accuracy and cell.f1.value == (cell.accuracy.value or 0) / 2 for cell in cells.values())
    assert [row.auroc and row.auroc.value for row in table.rows] == [0.8, 0.8]


def test_what_was_not_run_or_failed_is_said(small: Verdict) -> None:
    failed = replace(found("sex", "iid", 0.5), status="failed", headline=None, metrics=(), confusion=None)
    verdict = made(
        small, *(found("site", s, 0.9) for s in ("none", "iid")), *(found("sex", s, 0.6) for s in ("none", "dp")), failed
    )
    table = exposure(verdict)
    assert table is not None
    assert [cell.accuracy is None for row in table.rows for cell in row.cells] == [False, True, False, False, True, False]
    page = render([verdict])
    start = page.index('<table class="exposure">')
    text = page[start : page.index("</table>", start)]
    assert text.count("failed") == text.count("not run") == 1
    assert "<b>+40</b>" in text
    assert "<b>+10</b>" not in text
    assert "+10" in text


def test_no_table_for_one_setting_or_for_other_attacks(small: Verdict) -> None:
    assert exposure(small) is None
    assert exposure(made(small, found("site", "none", 0.7), found("sex", "iid", 0.7))) is None
    other = (replace(found("site", stack, 0.7), goal=Goal.MEMBERSHIP) for stack in STACKS)
    assert exposure(made(small, *other)) is None
    assert 'class="exposure"' not in render([small])


def test_words() -> None:
    assert in_words("centralised+dp-sgd") == "Centralised + dp-sgd"
    assert in_words("dp-sgd+top-k") == "+ dp-sgd + top-k"
    assert in_words("siloed") == "Siloed"
    assert [under(stack) for stack in ("none", "dp", "iid")] == ["Without a defence", "With dp", "Federated, IID"]
    assert [points(value) for value in (0.042, -0.121, 0.004, -0.004)] == ["+4", "−12", "0", "0"]
