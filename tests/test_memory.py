from __future__ import annotations

import subprocess
import sys

FAULTS = """
import resource, sys, torch
from flpriv import memory
if sys.argv[1] == "keep":
    memory.keep()
def work():
    return [torch.ones(1 << 21) for _ in range(4)]
for _ in range(5):
    work()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    work()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def test_memory_that_was_freed_is_used_again() -> None:
    """Twenty times 32 MB: with fresh pages each time, tens of thousands of faults. Only glibc can be told."""
    free, kept = (
        int(subprocess.run([sys.executable, "-c", FAULTS, how], capture_output=True, text=True, check=True).stdout)
        for how in ("free", "keep")
    )
    assert kept <= free / 10 or not sys.platform.startswith("linux")
