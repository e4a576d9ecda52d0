"""The API reference is what the docstrings say now, and it leaves no public name out."""

from __future__ import annotations

import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "api.md"


def test_the_reference_is_current(tmp_path):
    made = tmp_path / "api.md"
    subprocess.run([sys.executable, ROOT / "tools" / "make_api_docs.py", made], check=True, capture_output=True)
    assert made.read_text() == PAGE.read_text(), "docs/api.md is out of date; run `make docs`"


@pytest.mark.parametrize("module", ["evenflow", "evenflow.models", "evenflow.memory"])
def test_every_public_name_is_described(module):
    page = PAGE.read_text().splitlines()
    for name in import_module(module).__all__:
        described = f"### {name}" in page
        assert described or name == "__version__", f"{module}.{name} is missing from docs/api.md"
