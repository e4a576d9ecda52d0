"""What holds for every test: no network, two threads at most, and a word on the text that is read."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: no test may depend on what a hub answers

import hypothesis
import torch

# Small tensors on many threads cost more in waiting than they win; where tests run side by side, each has one.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else min(2, torch.get_num_threads()))

# A slow machine is not a failing test; an example that failed is printed so that it can be run again anywhere.
hypothesis.settings.register_profile("evenflow", deadline=None, print_blob=True)
hypothesis.settings.load_profile("evenflow")


def pytest_report_header() -> str:
    """Tests that read books fall back to text that they make; say which of the two this run does."""
    books = os.environ.get("EVENFLOW_DATA")
    return f"books: {books}" if books else "books: none (EVENFLOW_DATA is not set), tests read text that they make"
