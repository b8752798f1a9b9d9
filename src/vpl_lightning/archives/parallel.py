"""Work on many files in helper processes, with a progress bar and bounded memory."""

from __future__ import annotations

import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import get_context
from typing import TypeVar

from tqdm import tqdm

from vpl_lightning.errors import DataError

Item = TypeVar("Item")
Result = TypeVar("Result")

CHUNK = 16
"""Items that travel to a helper process together."""
CHUNKS_AHEAD = 4
"""Chunks that wait for each helper process, so that none is idle and few items are in memory."""


def process_files(
    function: Callable[[Item], Result], items: Iterable[Item], *, total: int, title: str, workers: int | None
) -> Iterator[Result]:
    """Apply a function to items, and yield its results in order.

    Args:
        function: Importable by name.
        items: Taken a few at a time.
        total: How many there are, for the progress bar.
        title: Shown beside the bar.
        workers: Helper processes; one works in this process, None takes one a core.

    Raises:
        DataError: If a helper process dies.
    """
    workers = min(workers or os.cpu_count() or 1, -(-total // CHUNK))
    results = map(function, items) if workers <= 1 else _spread(function, items, workers)
    yield from tqdm(results, desc=title, total=total, unit="file", file=sys.stderr, mininterval=0.5)


def _spread(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    remaining = iter(items)
    waiting: deque[Future[list[Result]]] = deque()
    with ProcessPoolExecutor(workers, mp_context=get_context("forkserver")) as pool:
        while True:
            while len(waiting) < workers * CHUNKS_AHEAD and (chunk := list(islice(remaining, CHUNK))):
                waiting.append(pool.submit(_apply, function, chunk))
            if not waiting:
                return
            try:
                results = waiting.popleft().result()
            except BrokenProcessPool as error:
                raise DataError(
                    "a helper process was ended from outside, often for lack of memory; take fewer --workers"
                ) from error
            yield from results


def _apply(function: Callable[[Item], Result], chunk: list[Item]) -> list[Result]:
    return [function(item) for item in chunk]
