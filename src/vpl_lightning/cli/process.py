"""What a process of ``vpl`` asks of OpenMP and of the C library, before torch is loaded."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
"""glibc's ``M_TRIM_THRESHOLD`` and ``M_MMAP_THRESHOLD`` (``malloc.h``)."""
KEPT_BYTES = 1 << 30
"""Freed memory up to which the process keeps it."""


def tune() -> None:
    """Let idle threads sleep and keep freed arrays; what the environment says already goes first.

    Spinning, threads that wait for each other slow each other down several times on cores that others use too.
    Given back to the system, the temporary arrays of an image are tens of thousands of pages that have to be taken
    anew for the next.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & set(os.environ):
        with suppress(AttributeError, OSError, TypeError):  # another C library
            library = ctypes.CDLL(None)
            library.mallopt(TRIM_THRESHOLD, KEPT_BYTES)
            library.mallopt(MMAP_THRESHOLD, KEPT_BYTES)
