"""The command line: every mistake ends in one clear line and exit code 2, and a killed run goes on."""

from __future__ import annotations

import contextlib
import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from flpriv.cli import main
from flpriv.errors import ScenarioError

SCENARIO = """
name = "small"
seed = 3

[sites]
source = "phantom"
sites = 2
patients = 14
size = 16

[federation]
rounds = {rounds}
[federation.local]
batch_size = 8
lr = 0.05

[threat]
model = "honest-but-curious"

[attacks.loss-threshold]
"""


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


def flpriv(*arguments: object, cwd: Path) -> Done:
    """Run a command as the console script does, in this process and in another folder."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    before = sys.argv
    here = ("--jobs", "1") if arguments[0] in ("run", "attack") else ()
    sys.argv = ["flpriv", *map(str, arguments), *here]
    try:
        with contextlib.chdir(cwd), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
    finally:
        sys.argv = before
    return Done(code, out.getvalue(), err.getvalue())


def write(folder: Path, text: str, name: str = "scenario.toml") -> Path:
    path = folder / name
    path.write_text(text)
    return path


def refused(done: Done) -> str:
    """The one line of a refusal."""
    assert done.returncode == 2, done.stdout + done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("Error: ")]
    assert len(lines) == 1, done.stderr
    assert "Traceback" not in done.stderr
    return lines[0]


@pytest.fixture
def scenario(tmp_path: Path) -> Path:
    return write(tmp_path, SCENARIO.format(rounds=2))


def manifest(folder: Path, *, rows: list[dict[str, str]], image: bytes | None = None, suffix: str = ".png") -> Path:
    """A manifest of small images at two sites, and the scenario that reads it."""
    for place, row in enumerate(rows):
        path = folder / f"{place}{suffix}"
        row["path"] = path.name
        Image.fromarray(np.full((20, 20), 10 * place + 5, dtype=np.uint8)).save(path, format="PNG")
    if image is not None:
        (folder / f"3{suffix}").write_bytes(image)
    with (folder / "metadata.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, fieldnames=list(rows[0]))
        table.writeheader()
        table.writerows(rows)
    text = f"""
    [sites]
    source = "manifest"
    root = "{folder}"
    size = 16
    columns = {{ label = "finding" }}
    classes = ["no", "yes"]
    [federation]
    rounds = 1
    [attacks.loss-threshold]
    """
    return write(folder, text)


def rows(count: int = 24) -> list[dict[str, str]]:
    findings = ("no", "yes")
    return [
        {"path": "", "site": f"s{i % 2}", "patient_id": f"p{i}", "finding": findings[i // 2 % 2], "split": ""}
        for i in range(count)
    ]


def test_unknown_attack(scenario: Path, tmp_path: Path) -> None:
    write(tmp_path, scenario.read_text() + "\n[attacks.los-threshold]\n")
    assert "did you mean 'loss-threshold'?" in refused(flpriv("check", scenario, cwd=tmp_path))


def test_misspelt_option(scenario: Path, tmp_path: Path) -> None:
    line = refused(flpriv("check", scenario, "--set", "sites.patiens=3", cwd=tmp_path))
    assert "patiens" in line
    assert "did you mean 'patients'?" in line


def test_misspelt_key_and_missing_file(scenario: Path, tmp_path: Path) -> None:
    assert "did you mean 'sites'?" in refused(flpriv("check", scenario, "--set", "site.source=phantom", cwd=tmp_path))
    assert "nowhere.toml" in refused(flpriv("run", "nowhere.toml", cwd=tmp_path))


def test_verbose_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ScenarioError, match=r"nowhere\.toml"):
        flpriv("run", "nowhere.toml", "--verbose", cwd=tmp_path)


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "flpriv", "run", "nowhere.toml"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert "nowhere.toml" in refused(Done(done.returncode, done.stdout, done.stderr))


def test_corrupt_png_names_site_and_file(tmp_path: Path) -> None:
    path = manifest(tmp_path, rows=rows(), image=b"\x89PNG\r\n\x1a\nbroken")
    line = refused(flpriv("run", path, cwd=tmp_path))
    assert "3.png" in line


def test_dicom_without_pixels(tmp_path: Path, test_data: Path) -> None:
    import pydicom

    header = pydicom.dcmread(test_data / "dicom" / "dx_chest_nih_p1_cardiomegaly.dcm")
    del header.PixelData
    path = manifest(tmp_path, rows=rows(), suffix=".dcm")
    for file in tmp_path.glob("*.dcm"):
        header.save_as(file)
    line = refused(flpriv("run", path, cwd=tmp_path))
    assert ".dcm" in line
    assert "pixel" in line.lower()


def test_missing_column(tmp_path: Path) -> None:
    found = [{key: value for key, value in row.items() if key != "finding"} for row in rows()]
    line = refused(flpriv("check", manifest(tmp_path, rows=found), cwd=tmp_path))
    assert "metadata.csv" in line
    assert "finding" in line


def test_duplicate_patient_across_splits(tmp_path: Path) -> None:
    found = rows()
    for place, row in enumerate(found):
        row["split"] = "test" if place % 3 == 0 else "train"
    found[2]["patient_id"] = found[0]["patient_id"]
    line = refused(flpriv("check", manifest(tmp_path, rows=found), cwd=tmp_path))
    assert "'p0'" in line


def test_nan_update_is_an_event_not_a_crash(scenario: Path, tmp_path: Path) -> None:
    done = flpriv("run", scenario, "--set", "federation.local.lr=1e30", "--out", "nan", cwd=tmp_path)
    assert "Traceback" not in done.stderr
    result = json.loads((tmp_path / "nan" / "settings" / "none" / "result.json").read_text())
    assert any("NaN" in event["what"] for event in result["events"])


def test_an_occupied_folder_is_not_overwritten(scenario: Path, tmp_path: Path) -> None:
    assert flpriv("run", scenario, "--out", "here", cwd=tmp_path).returncode == 0
    assert "--resume" in refused(flpriv("run", scenario, "--out", "here", cwd=tmp_path))
    other = write(tmp_path, SCENARIO.format(rounds=3), "other.toml")
    assert "another scenario" in refused(flpriv("run", other, "--out", "here", "--resume", cwd=tmp_path))


def test_a_killed_run_goes_on_and_ends_the_same(tmp_path: Path) -> None:
    scenario = write(tmp_path, SCENARIO.format(rounds=12))
    whole = flpriv("run", scenario, "--out", "whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [sys.executable, "-m", "flpriv", "run", str(scenario), "--out", "cut"]
    capture = tmp_path / "cut" / "settings" / "none" / "capture"
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (capture / "round-0003" / "round.json").exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    kept = {path: path.stat().st_mtime_ns for path in (capture / "round-0002").iterdir()}
    assert kept
    done = flpriv("run", "--resume", "--out", "cut", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path: path.stat().st_mtime_ns for path in (capture / "round-0002").iterdir()} == kept
    settings = [tmp_path / name / "settings" / "none" for name in ("whole", "cut")]
    finals = [load_file(setting / "final.safetensors") for setting in settings]
    assert all(np.array_equal(finals[0][key], finals[1][key]) for key in finals[0])
    rounds = [sorted(path.name for path in (setting / "capture").glob("round-*")) for setting in settings]
    assert rounds[0] == rounds[1]


def test_resume_takes_the_newest_run_as_it_was_started(scenario: Path, tmp_path: Path) -> None:
    assert "nothing to resume" in refused(flpriv("run", "--resume", cwd=tmp_path))
    assert flpriv("run", scenario, cwd=tmp_path).returncode == 0
    assert flpriv("run", "--resume", cwd=tmp_path).returncode == 0
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["small"]
    assert "leave out --set" in refused(flpriv("run", "--resume", "--set", "federation.rounds=9", cwd=tmp_path))


def test_run_attack_report(scenario: Path, tmp_path: Path) -> None:
    done = flpriv("run", scenario, "--out", "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.strip().splitlines()[-1].removeprefix("Report: "))
    assert page == tmp_path / "run" / "report.html"
    assert page.with_suffix(".json").is_file()
    assert page.with_suffix(".csv").is_file()
    assert (tmp_path / "run").stat().st_mode & 0o777 == 0o700
    again = flpriv("attack", "run", "loss-threshold", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert "unknown attack" in refused(flpriv("attack", "run", "nothing", cwd=tmp_path))
    both = flpriv("report", "run", "run", "-o", "both.html", "--redact-images", cwd=tmp_path)
    assert both.returncode == 0, both.stderr
    assert (tmp_path / "both.html").is_file()
    assert "nowhere" in refused(flpriv("report", "nowhere", cwd=tmp_path))


def test_a_failing_attack_is_a_failed_row_and_a_non_zero_exit(scenario: Path, tmp_path: Path) -> None:
    plugin = '''
"""An attack that fails."""
from dataclasses import dataclass
from flpriv.attack import Attack
from flpriv.claim import Goal
from flpriv.threat import Can

@dataclass(frozen=True, kw_only=True)
class Broken(Attack):
    """Fails."""
    name = "broken"
    goal = Goal.MEMBERSHIP
    needs = Can.SEE_FINAL
    paper = "none"
    def run(self, capture, *, rng):
        raise ZeroDivisionError("by design")
'''
    write(tmp_path, plugin, "broken.py")
    text = 'plugins = ["broken.py"]\n' + scenario.read_text() + "\n[attacks.broken]\n"
    done = flpriv("run", write(tmp_path, text, "broken.toml"), "--out", "run", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    findings = json.loads((tmp_path / "run" / "report.json").read_text())
    assert "by design" in json.dumps(findings)


def test_fail_above(scenario: Path, tmp_path: Path) -> None:
    more = ("--set", "federation.local.epochs=1", "--out")
    assert "critical" in refused(flpriv("run", scenario, "--fail-above", "critcal", *more, "a", cwd=tmp_path))
    assert flpriv("run", scenario, "--fail-above", "critical", *more, "b", cwd=tmp_path).returncode == 0


def test_list_and_show(tmp_path: Path) -> None:
    listed = flpriv("list", "attacks", cwd=tmp_path)
    assert listed.returncode == 0
    assert "imprint" in listed.stdout
    shown = flpriv("show", "imprint", cwd=tmp_path)
    assert "bins" in shown.stdout
    assert "did you mean 'imprint'?" in refused(flpriv("show", "imprnt", cwd=tmp_path))


def test_check_says_what_would_be_run(scenario: Path, tmp_path: Path) -> None:
    done = flpriv("check", scenario, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "federation none: 2 rounds" in done.stdout
    assert not list(tmp_path.glob("runs"))


def test_a_run_folder_that_disappears_is_no_run(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "file").write_text("mine")
    scenario = write(tmp_path, SCENARIO.format(rounds=1))
    assert "not empty" in refused(flpriv("run", scenario, "--out", "x", cwd=tmp_path))
    shutil.rmtree(tmp_path / "x")
