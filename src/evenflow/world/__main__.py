"""`python -m evenflow.world [CLIPS]` prints how far the judge errs on films of which all is known."""

from __future__ import annotations

import sys

from .measure import table

if __name__ == "__main__":
    print(table(clips=int(sys.argv[1]) if len(sys.argv) > 1 else 24))
