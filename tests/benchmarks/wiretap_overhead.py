"""What the wiretap costs: an inline run with it against the same run with the bare strategy.

Four sites, about 150 X-rays of 64 x 64 each, the small CNN. Prints the ratio of wall times and of CPU times, which other work on
the machine disturbs less; both should stay below 1.10.

    python tests/benchmarks/wiretap_overhead.py [repeats]
"""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")

import sys
import tempfile
import time
from pathlib import Path

from flpriv import data, scenario
from flpriv.clients.app import app as client
from flpriv.engine import inline
from flpriv.engine.config import RunConfig
from flpriv.strategies.server import app as server

TABLES = {
    "name": "wiretap overhead",
    "sites": {"source": "phantom", "sites": 4, "patients": 108, "size": 64, "split": {"test": 0.0, "public": 0.0}},
    "federation": {"rounds": 3, "options": {"fraction_evaluate": 0.0}, "local": {"batch_size": 16, "epochs": 1}},
}


def seconds(wiretap: int) -> tuple[float, float]:
    """Wall and CPU time of one run, images read before."""
    which = scenario.parse(TABLES, root=Path.cwd())
    with tempfile.TemporaryDirectory() as out:
        told = RunConfig(scenario=which, setting=which.settings()[0], out=Path(out)).to_dict() | {"wiretap": wiretap}
        wall, cpu = time.perf_counter(), time.process_time()
        inline.run_apps(client, server, nodes=4, run_config=told)
        return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    """Alternate both, so that a busy machine troubles both alike."""
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    which = scenario.parse(TABLES, root=Path.cwd())
    images = [len(data.records(which, site, "train")) for site in range(4)]
    seconds(0)
    pairs = [(seconds(0), seconds(1)) for _ in range(repeats)]
    for place, what in enumerate(("wall", "CPU")):
        bare, tapped = (min(run[place] for run in runs) for runs in zip(*pairs, strict=True))
        print(f"{images} images, 3 rounds: {what} {bare:.2f} s bare, {tapped:.2f} s tapped, ratio {tapped / bare:.3f}")


if __name__ == "__main__":
    main()
