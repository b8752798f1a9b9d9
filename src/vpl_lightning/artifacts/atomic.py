"""Files that appear whole or not at all, whoever is killed and however many processes share the folder."""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

STALE_AFTER_S = 86_400
"""Age in seconds at which the temporary file of an unknown process counts as abandoned."""

_LEFTOVER = re.compile(r"^\..+\.(?P<host>[\w-]+)-(?P<pid>\d+)-\d+\.partial$")
_HOST = re.sub(r"[^\w-]", "-", socket.gethostname()) or "host"
_counter = count()


@contextmanager
def atomic_path(path: str | Path, *, sync: bool = False) -> Iterator[Path]:
    """Give a temporary path in the folder of ``path``; on success it becomes ``path`` in one step.

    When the body raises, the temporary file is removed and ``path`` stays as it was. A missing folder is
    made.

    Args:
        path: The final name.
        sync: Flush the file to the disk before the move, so that it also survives a power failure.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{_HOST}-{os.getpid()}-{next(_counter)}.partial")
    try:
        yield partial
        if sync:
            with partial.open("rb+") as file:
                os.fsync(file.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def atomic_write(path: str | Path, content: bytes, *, sync: bool = False) -> None:
    """Write ``content`` to ``path``, whole or not at all (see :func:`atomic_path`)."""
    with atomic_path(path, sync=sync) as partial:
        partial.write_bytes(content)


def remove_leftovers(folder: str | Path) -> int:
    """Remove temporary files of killed processes below ``folder`` and return how many.

    Files of living processes are kept, other hosts' and unknown ones until :data:`STALE_AFTER_S` old,
    so that several ranks may clean the folder that they share.
    """
    removed = 0
    for partial in Path(folder).rglob(".*.partial"):
        if _abandoned(partial):
            partial.unlink(missing_ok=True)
            removed += 1
    return removed


def _abandoned(partial: Path) -> bool:
    match = _LEFTOVER.match(partial.name)
    if match and match["host"] == _HOST and not _alive(int(match["pid"])):
        return True
    try:
        return time.time() - partial.stat().st_mtime > STALE_AFTER_S
    except FileNotFoundError:
        return False


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
