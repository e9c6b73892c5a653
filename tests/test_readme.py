"""What the README tells a newcomer to write is accepted as it stands."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flpriv import audit, data
from flpriv.registry import Kind, plugins
from flpriv.scenario import read

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    """The first fenced block of a language, without the indent of the list it stands in."""
    (first, *_) = re.findall(rf"^( *)```{language}\n(.*?)^ *```", README, flags=re.MULTILINE | re.DOTALL)
    indent, text = first
    return "\n".join(line.removeprefix(indent) for line in text.splitlines())


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of images and the README's table of them, made longer: two hospitals with 24 patients each."""
    header, *rows = csv.reader(io.StringIO(block("csv")))
    assert header[:4] == ["path", "site", "patient_id", "label"]
    folder = tmp_path / "xray"
    folder.mkdir()
    draw = np.random.default_rng(0)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(header)
        for number in range(48):
            site, (label, *rest) = rows[number % 2][1], rows[number // 2 % 2][3:]
            table.writerow([f"{number}.png", site, f"p-{number}", label, *rest])
            Image.fromarray(draw.integers(0, 256, (80, 70), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder


def test_the_scenario_of_the_readme_can_be_run_on_the_table_of_the_readme(images: Path, tmp_path: Path) -> None:
    file = tmp_path / "my-scenario.toml"
    file.write_text(block("toml"))
    scenario = read(file, overrides=[f"sites.root={images}"])
    audit.check(scenario)
    assert [site.name for site in data.sites(scenario)] == ["North", "South"]
    assert data.task(scenario).classes == ("normal", "pneumonia")
    assert data.records(scenario, 0, "train").images.shape[1:] == (1, 64, 64)
    assert data.records(scenario, 0, "train").attributes.keys() >= {"site", "age", "sex"}


def test_the_lines_for_an_own_app_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flwr.clientapp import ClientApp
    from flwr.serverapp.strategy import FedAvg

    from flpriv.defenses.top_k import TopK
    from flpriv.strategies.wiretap import Wiretap

    monkeypatch.chdir(tmp_path)
    found: dict[str, object] = {"FedAvg": FedAvg, "Wiretap": Wiretap, "ClientApp": ClientApp, "TopK": TopK}
    exec(compile(block("python"), "README.md", "exec"), found)
    assert isinstance(found["strategy"], Wiretap)
    assert isinstance(found["app"], ClientApp)


def test_files_and_links_of_the_readme_are_there() -> None:
    root = Path(__file__).resolve().parents[1]
    named = re.findall(r"\]\((?!http)([^)#]+)\)", README) + re.findall(r"^\| `(\w+/)` \|", README, flags=re.MULTILINE)
    assert named
    assert [name for name in named if not (root / name).exists()] == []


@pytest.mark.parametrize("kind", ["attacks", "defenses"])
def test_the_table_lists_what_is_registered(kind: Kind) -> None:
    section = README.partition("## Attacks and defences")[2].partition("\n## ")[0]
    head = {"attacks": "| attack |", "defenses": "| defence |"}[kind]
    table = section.partition(head)[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `([^`]+)` \|", table, flags=re.MULTILINE)) == set(plugins(kind))


def test_the_two_commands_are_targets() -> None:
    makefile = (Path(__file__).resolve().parents[1] / "Makefile").read_text(encoding="utf-8")
    commands = re.findall(r"^    make (\w+)", README.partition("\n## ")[0], flags=re.MULTILINE)
    assert commands == ["demo", "test"]
    assert all(f"\n{command}: install" in makefile for command in commands)
