"""How fast the command line answers: `python tests/benchmarks/startup.py`."""

from __future__ import annotations

import subprocess
import sys
import time

LIMITS = {"--help": 0.5, "list": 1.0}
"""Seconds that each command may take."""


def seconds(*command: str, repeats: int = 5) -> float:
    """The fastest of some runs of a command; the first one only warms the disk."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        subprocess.run(command, stdout=subprocess.DEVNULL, check=True)
        times.append(time.perf_counter() - start)
    return min(times[1:])


def main() -> int:
    """Print one line a command, and return how many are too slow."""
    bare = seconds(sys.executable, "-c", "pass")
    print(f"python -c pass   {bare:6.3f} s")
    slow = 0
    for argument, limit in LIMITS.items():
        took = seconds(sys.executable, "-m", "flpriv", argument)
        slow += took > limit
        verdict = "TOO SLOW" if took > limit else "ok"
        print(f"flpriv {argument:9} {took:6.3f} s   {took / bare:4.1f} × bare Python, limit {limit} s: {verdict}")
    return slow


if __name__ == "__main__":
    sys.exit(main())
