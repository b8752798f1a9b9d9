"""A progress bar for long work outside Lightning's own loops."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def progress(items: Iterable[T], *, total: int, what: str, shown: bool = True) -> Iterator[T]:
    """Iterate with a bar on standard error.

    Args:
        items: What is worked on.
        total: How many there are.
        what: A few words in front of the bar.
        shown: False on all ranks but the first.
    """
    from tqdm import tqdm

    yield from tqdm(items, total=total, desc=what, disable=not shown, file=sys.stderr, dynamic_ncols=True)
