"""`python -m evenflow` is the `evenflow` command."""

from .cli import main

main()
