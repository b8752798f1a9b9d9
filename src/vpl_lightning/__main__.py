"""``python -m vpl_lightning`` is the ``vpl`` command."""

import sys

from vpl_lightning.cli import main

if __name__ == "__main__":
    sys.exit(main())
