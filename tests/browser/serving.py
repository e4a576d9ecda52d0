"""The server that browser tests look at: python -m tests.browser.serving FOLDER PORT."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from evenflow.cli.living import texts
from evenflow.serve import Limits, Room, Store, address_of, create_app, listen, run
from tests.serve.double import Double

if __name__ == "__main__":
    limits = replace(Limits(), seats=6, autosave=0.5)
    bound = listen("127.0.0.1", int(sys.argv[2]))
    room = Room(Double(0.01), Store(Path(sys.argv[1]), limits.saved), limits)
    run(create_app(room, texts("tiny")), bound, limits, lambda: print(address_of(bound), flush=True))
