"""What ``vpl`` asks of its own process."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="freed memory is kept under glibc alone"
)
PROGRAM = """
import os, resource
from vpl_lightning.cli.process import tune
{call}
faults = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    before = faults()
    array = b"x" * (64 << 20)
    del array
print(faults() - before, os.environ.get("OMP_WAIT_POLICY"))
"""


def pages_taken(call: str, **environment: str) -> tuple[int, str]:
    """Page faults of a third array of 64 MB in a fresh process, and the wait policy that it sees."""
    own = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "MALLOC_"))}
    words = [sys.executable, "-c", PROGRAM.format(call=call)]
    done = subprocess.run(words, check=True, capture_output=True, text=True, env={**own, **environment})
    count, policy = done.stdout.split()
    return int(count), policy


def test_freed_arrays_are_kept_and_waiting_threads_sleep() -> None:
    plain, _ = pages_taken("")
    tuned, policy = pages_taken("tune()")
    assert plain > 20  # pages of 2 MB, at the least
    assert tuned < plain / 10
    assert policy == "PASSIVE"


def test_the_users_own_settings_go_first() -> None:
    taken, policy = pages_taken("tune()", OMP_WAIT_POLICY="ACTIVE", MALLOC_MMAP_THRESHOLD_="131072")
    assert taken > 20
    assert policy == "ACTIVE"
