"""Work spread over processes, file by file."""

import os
from pathlib import Path

import pytest

from vpl_lightning.archives.parallel import process_files
from vpl_lightning.artifacts import read_mask
from vpl_lightning.errors import DataError


def test_results_keep_their_order_and_errors_come_back():
    square = process_files(abs, range(-50, 50), total=100, title="", workers=2)
    assert list(square) == [abs(number) for number in range(-50, 50)]
    with pytest.raises(DataError, match="no such mask"):
        list(process_files(read_mask, [Path("gone.png")] * 40, total=40, title="", workers=2))
    with pytest.raises(DataError, match="a helper process was ended from outside"):
        list(process_files(os._exit, [9] * 40, total=40, title="", workers=2))
