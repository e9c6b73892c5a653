"""Work side by side gives what work in a row gives, errors included, and no worker outlives its parent."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from flpriv.errors import DataError
from flpriv.jobs import run
from flpriv.progress import listen

SCRIPT = """
import sys
from pathlib import Path
from flpriv import jobs

if __name__ == "__main__":
    sys.path.insert(0, {folder!r})
    import work
    jobs.run(work.stay, [{folder!r}] * 2, what="x", name=str, workers=2)
"""
WORK = """
import os, time
from pathlib import Path

def stay(folder):
    Path(folder, f"pid-{os.getpid()}").touch()
    time.sleep(120)
"""


def test_in_order_and_told() -> None:
    told: list[tuple[int, int | None]] = []
    with listen(lambda what, done, total, note: told.append((done, total))):
        assert run(abs, [-3, 2, -1], what="x", name=str) == [3, 2, 1]
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_processes_give_the_same_in_the_same_order() -> None:
    assert run(abs, [-3, 2, -1, -7], what="x", name=str, workers=2) == [3, 2, 1, 7]


def test_this_process_may_be_one_of_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It works from the other end, on its share of the threads, while the other processes start."""
    (tmp_path / "whereabouts.py").write_text("import os\n\n\ndef where(item):\n    return item, os.getpid()\n")
    monkeypatch.syspath_prepend(tmp_path)
    where = importlib.import_module("whereabouts").where
    told: list[tuple[int, int | None]] = []
    before = torch.get_num_threads()
    with listen(lambda what, done, total, note: told.append((done, total))):
        places = run(where, list(range(60)), what="x", name=str, workers=2, here=True)
    assert torch.get_num_threads() == before
    assert [item for item, _ in places] == list(range(60))
    assert os.getpid() in {pid for _, pid in places}
    assert len(told) == 61
    assert told[-1] == (60, 60)
    with pytest.raises(ValueError, match="invalid literal"):
        run(int, ["1", "one", "2", "3"], what="x", name=str, workers=2, here=True)


def fail(item: int) -> int:
    raise DataError(f"item {item}: wrong")


def test_an_error_reaches_the_caller() -> None:
    with pytest.raises(DataError, match="item 1: wrong"):
        run(fail, [1], what="x", name=str)
    with pytest.raises(ValueError, match="invalid literal"):
        run(int, ["1", "one"], what="x", name=str, workers=2)


def test_workers_end_with_a_killed_parent(tmp_path: Path) -> None:
    (tmp_path / "work.py").write_text(WORK)
    (tmp_path / "parent.py").write_text(SCRIPT.format(folder=str(tmp_path)))
    parent = subprocess.Popen([sys.executable, str(tmp_path / "parent.py")], cwd=tmp_path)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("pid-*"))) < 2 and time.monotonic() < deadline and parent.poll() is None:
        time.sleep(0.05)
    pids = [int(path.name.removeprefix("pid-")) for path in tmp_path.glob("pid-*")]
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    assert pids
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z" if Path(f"/proc/{pid}/stat").exists() else True
