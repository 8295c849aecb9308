"""The operator by a clock that a test moves on: the file that HURRY names holds how many seconds it is ahead.

python -m tests.api.hurried --settings ...
"""

from __future__ import annotations

import os
import sys
from datetime import datetime, timedelta
from pathlib import Path

from trimtab_operator import main
from trimtab_operator.reconcile import utc


def ahead() -> datetime:
    """The time of day, so many seconds from now."""
    return utc() + timedelta(seconds=float(Path(os.environ["HURRY"]).read_text()))


if __name__ == "__main__":
    sys.exit(main.main(clock=ahead))
