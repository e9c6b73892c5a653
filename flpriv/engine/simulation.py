"""The simulation engine: the same two apps on Flower's own runtime on Ray, for many virtual sites and for a Ray cluster.

A SuperLink of our own is started on a free port with a private home, the app is handed over with ``flwr run``, and everything
that was started is ended again, whatever happens. ``RAY_ADDRESS`` sends the clients to a Ray cluster.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import flpriv
from flpriv import data
from flpriv.canary import canary_sites
from flpriv.engine.config import RunConfig
from flpriv.errors import RunError
from flpriv.files import private_folder, write_private
from flpriv.progress import tell

if TYPE_CHECKING:
    from flpriv.scenario import Scenario, Setting

NAME = "flpriv-run"
CONNECTION = "flpriv"
MARK = "FLPRIV_SIMULATION"
"""Every process of a simulation carries this variable, with a value of its own."""
OWNER = "FLPRIV_SIMULATION_OWNER"
"""And this one, with the id of the process that started it."""

PROJECT = """\
[project]
name = "{name}"
version = "1.0.0"
description = "One setting of a privacy audit"
license = "Apache-2.0"
dependencies = []

[tool.flwr.app]
publisher = "flpriv"

[tool.flwr.app.components]
serverapp = "flpriv_run:server"
clientapp = "flpriv_run:client"

[tool.flwr.app.config]
{config}
"""
APP = '''\
"""One setting of a privacy audit: flpriv's two Flower apps, as installed."""

from flpriv.clients.app import app as installed_client
from flpriv.strategies.server import app as installed_server

client = installed_client
server = installed_server
'''
REVIVE = """
from flpriv.engine.simulation import revive_clients

revive_clients()
"""


def run(scenario: Scenario, setting: Setting, *, folder: Path, resume: bool = False) -> None:
    """Run one setting on Flower's simulation runtime.

    Args:
        scenario: the whole scenario.
        setting: one of its settings.
        folder: the setting's folder, made with mode 0700.
        resume: go on after the last finished round found in ``folder``.

    Raises:
        RunError: if the runtime does not start or the run fails, with the last lines of its log.
        FlprivError: if the scenario is wrong or a file cannot be written.
    """
    nodes = len(data.nodes(scenario, setting.arrangement)) + canary_sites(scenario, setting)
    out = private_folder(folder).resolve()
    write_private(out / "scenario.json", scenario.to_json().encode())
    config = RunConfig(scenario=scenario, setting=setting, out=out, resume=resume).to_dict()
    run_app(
        APP,
        nodes=nodes,
        run_config=config | {"scenario": str(out / "scenario.json")},
        what=f"setting {setting.id!r}",
        progress=lambda: _tell_rounds(out / "checkpoint", setting.rounds),
    )
    if not (out / "result.json").is_file():
        raise RunError(f"setting {setting.id!r}: the simulation ended without a result in {out}; run again with --resume")


def run_app(
    source: str,
    *,
    nodes: int,
    run_config: Mapping[str, str | int],
    what: str,
    progress: Callable[[], None] = lambda: None,
    cpus_per_client: int = 1,
) -> None:
    """Run a Flower app of one file, ``source``, which assigns ``server`` and ``client``, on ``nodes`` virtual sites.

    Args:
        source: text of the module.
        nodes: how many virtual sites, ≥ 1.
        run_config: what both apps find in ``context.run_config``; strings and whole numbers.
        what: names the run in errors.
        progress: called about twice a second while the run goes on.
        cpus_per_client: how many CPUs Ray sets aside for a client.

    Raises:
        RunError: if the runtime does not start or the run fails, with the last lines of its log.
    """
    with _superlink(what) as runtime:
        app = _write_app(runtime.home, source, run_config)
        resources = f"num-supernodes={nodes} client-resources-num-cpus={cpus_per_client} client-resources-num-gpus=0.0"
        log = runtime.home / "run.log"
        command = [_tool("flwr"), "run", str(app), CONNECTION, "--stream", "--federation-config", resources]
        with log.open("wb") as output:
            streaming = subprocess.Popen(
                command, env=runtime.environment, cwd=runtime.home, stdout=output, stderr=subprocess.STDOUT
            )
        try:
            while streaming.poll() is None:
                if runtime.process.poll() is not None:
                    raise RunError(f"{what}: Flower's SuperLink ended by itself:\n{_tail(runtime.log)}")
                progress()
                time.sleep(0.5)
        finally:
            streaming.kill()
            streaming.wait()
        progress()
        if (status := _status(runtime)) != "finished:completed":
            raise RunError(f"{what}: the simulation ended as {status!r}:\n{_tail(log)}")


def revive_clients() -> None:
    """Have Ray start a client's process again when it dies; Flower's pool would hand the dead one every later message.

    The message it died on is tried once more, and messages wait while the process starts; a client that dies again becomes an
    error reply. Flower loads the app before it makes its pool of processes, so this is called by the app's own module.
    """
    from flwr.simulation.ray_transport.ray_actor import ClientAppActor

    vars(ClientAppActor)["_default_options"].update(max_restarts=-1, max_task_retries=1)


@dataclass(frozen=True, kw_only=True)
class _Runtime:
    """A SuperLink of our own.

    Args:
        home: its private folder: Flower's and Ray's files, the app, the logs.
        environment: for every process of the run.
        process: the SuperLink.
        log: what it says.
    """

    home: Path
    environment: Mapping[str, str]
    process: subprocess.Popen[bytes]
    log: Path


@contextmanager
def _superlink(what: str) -> Iterator[_Runtime]:
    """A running SuperLink; on the way out it is ended with all that it started, and its folder removed."""
    home = Path(tempfile.mkdtemp(prefix="flp-"))
    port, mark = _free_port(), uuid.uuid4().hex
    environment = _environment(home, port, mark)
    connection = f'[superlink.{CONNECTION}]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    write_private(home / "config.toml", f'[superlink]\ndefault = "{CONNECTION}"\n\n{connection}'.encode())
    log = home / "superlink.log"
    command = [_tool("flower-superlink"), "--insecure", "--simulation", "--isolation", "subprocess", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--control-api-address", f"127.0.0.1:{environment['FLWR_LOCAL_CONTROL_API_PORT']}"]
    try:
        with log.open("wb") as output:
            process = subprocess.Popen(
                command, env=environment, cwd=home, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )
        try:
            _wait_for(port, process, log, what)
            yield _Runtime(home=home, environment=environment, process=process, log=log)
        finally:
            _end(process, mark)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def _environment(home: Path, port: int, mark: str) -> dict[str, str]:
    """Ours, with Flower and Ray kept private and quiet, one thread each, and this flpriv in front."""
    beside = [str(Path(next(iter(flpriv.__path__))).resolve().parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_LOCAL_SUPERLINK_HTTP_API_PORT": str(port),
        "FLWR_LOCAL_CONTROL_API_PORT": str(_free_port()),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": str(home),
        "OMP_NUM_THREADS": "1",
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "PYTHONPATH": os.pathsep.join(filter(None, beside)),
        MARK: mark,
        OWNER: str(os.getpid()),
    }


def _write_app(home: Path, source: str, run_config: Mapping[str, str | int]) -> Path:
    app = private_folder(home / NAME)
    config = "\n".join(f"{key} = {json.dumps(value)}" for key, value in run_config.items())
    write_private(app / "pyproject.toml", PROJECT.format(name=NAME, config=config).encode())
    write_private(app / "flpriv_run.py", (source + REVIVE).encode())
    return app


def _wait_for(port: int, process: subprocess.Popen[bytes], log: Path, what: str, *, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if process.poll() is not None:
            raise RunError(f"{what}: Flower's SuperLink did not start:\n{_tail(log)}")
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise RunError(f"{what}: Flower's SuperLink did not answer within {seconds:g} s:\n{_tail(log)}")


def _status(runtime: _Runtime) -> str:
    """How the only run of our SuperLink stands; ``flwr run`` itself says nothing of a failure."""
    command = [_tool("flwr"), "ls", CONNECTION, "--format", "json"]
    asked = subprocess.run(command, env=runtime.environment, cwd=runtime.home, capture_output=True, text=True, check=False)
    try:
        runs = json.loads(asked.stdout)["runs"]
        return str(runs[0]["status"]) if runs else "never started"
    except (ValueError, KeyError, TypeError):
        return "unknown"


def _end(process: subprocess.Popen[bytes], mark: str) -> None:
    """End the SuperLink and every process that carries its mark, politely first."""
    for sign, patience in ((signal.SIGTERM, 10.0), (signal.SIGKILL, 5.0)):
        end = time.monotonic() + patience
        for pid in {process.pid, *_marked(mark)}:
            _signal(pid, sign)
        while time.monotonic() < end and (process.poll() is None or _marked(mark)):
            time.sleep(0.1)
        if process.poll() is not None and not _marked(mark):
            return


def _marked(mark: str) -> list[int]:
    """Processes whose environment carries the mark; without ``/proc`` none, and Flower's and Ray's end with their parent."""
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
        except OSError:
            continue
    return found


def _signal(pid: int, sign: signal.Signals) -> None:
    try:
        os.kill(pid, sign)
    except ProcessLookupError:
        return


def _tool(name: str) -> str:
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.is_file() else shutil.which(name)
    if found is None:
        raise RunError(f"{name} is not installed; pip install 'flwr[simulation]'")
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _tail(log: Path, lines: int = 15) -> str:
    """The last lines of a log, without colours and frames."""
    text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]", "", log.read_text(errors="replace")) if log.exists() else ""
    rows: Sequence[str] = [row.rstrip() for row in text.splitlines() if row.strip()]
    return "\n".join(f"    {row}" for row in rows[-lines:]) or "    (the log is empty)"


def _tell_rounds(checkpoints: Path, total: int) -> None:
    done = [int(path.stem.removeprefix("round-")) for path in checkpoints.glob("round-*.json")]
    tell("rounds", max(done, default=0), total)
