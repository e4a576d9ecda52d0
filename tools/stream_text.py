"""Print a real text that every Python has with it, the documentation topics of `help()`: python tools/stream_text.py"""

from __future__ import annotations

import contextlib
import sys
from pydoc_data.topics import topics


def main() -> None:
    # Whoever reads may have had enough before the end.
    with contextlib.suppress(BrokenPipeError):
        for _, text in sorted(topics.items()):
            sys.stdout.write(text + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
