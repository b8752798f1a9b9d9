"""A small whole run through the real command line, shared by the tests of what it leaves behind."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.runs import SMALL, vpl


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run folder of ``vpl fit`` on a few drawn scenes."""
    root = tmp_path_factory.mktemp("run")
    result = vpl("fit", *SMALL, f"--trainer.default_root_dir={root}")
    assert result.returncode == 0, result.stderr
    (root / "stdout.txt").write_text(result.stdout)
    return root
