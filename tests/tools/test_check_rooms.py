"""The check of import directions: it passes here, and each way to import upwards is caught."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECK = ROOT / "tools" / "check_rooms.py"


def check(root: Path) -> tuple[int, list[str]]:
    done = subprocess.run([sys.executable, CHECK, root], capture_output=True, text=True, check=False)
    return done.returncode, done.stderr.splitlines()


def tree(root: Path, files: dict[str, str]) -> Path:
    (root / "pyproject.toml").write_text('[project]\ndependencies = ["torch>=2", "numpy", "rich"]\n')
    for name, text in files.items():
        path = root / "src" / "evenflow" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_the_repository_passes():
    assert check(ROOT) == (0, [])


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("memory/ring.py", "from ..recipes import recipe", "memory imports recipes; it may import no other room"),
        ("memory/ring.py", "from .. import models", "memory imports models; it may import no other room"),
        ("memory/ring.py", "import evenflow.models.stream", "memory imports models; it may import no other room"),
        ("memory/deep/ring.py", "from ...api import open", "memory imports api; it may import no other room"),
        ("memory/__init__.py", "from ..models import Stream", "memory imports models; it may import no other room"),
        (
            "models/stream.py",
            "def f():\n    from ..recipes import parse",
            "models imports recipes; it may import memory",
        ),
        ("models/stream.py", "from evenflow import open", "models imports api; it may import memory"),
        ("models/stream.py", "import evenflow as ef", "models imports api; it may import memory"),
        ("recipes/full.py", "from importlib import import_module\nimport_module('evenflow.models')", "imports models"),
        ("recipes/full.py", "import importlib\nimportlib.import_module('..models', __name__)", "imports models"),
        ("recipes/full.py", "from importlib import import_module\nimport_module(name)", "cannot be read"),
        ("learn/toys.py", "from ..claims import run", "learn imports claims; it may import"),
        (
            "media/text.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .. import api",
            "media imports",
        ),
        ("claims/card.py", "from ..cli import app", "claims imports cli"),
        ("api.py", "from .learn import pretrain", "api imports learn; it may import generate, memory, models, recipes"),
        ("memory/ring.py", "import numpy", "memory imports numpy; it may import safetensors, torch"),
        ("models/stream.py", "import psutil", "models imports psutil; it may import numpy, rich, torch"),
        ("attic/old.py", "", "room 'attic' is unknown"),
    ],
)
def test_an_import_that_points_upwards_is_refused(tmp_path, name, text, said):
    code, lines = check(tree(tmp_path, {name: text}))
    assert code == 1
    assert len(lines) == 1, lines
    assert said in lines[0]
    assert lines[0].startswith(f"src/evenflow/{name}:")


def test_imports_that_point_downwards_pass(tmp_path):
    files = {
        "__init__.py": "from importlib import import_module\n\ndef __getattr__(name): return import_module(name)",
        "memory/ring.py": "import math\nimport torch\nfrom . import verbs\nfrom .rope import Rope\nfrom .. import __version__",
        "recipes/full.py": "from ..memory import Memory\nfrom .registry import register",
        "api.py": "from .memory import Memory\nfrom .recipes import parse\nfrom evenflow.models import Stream",
        "claims/card.py": "import numpy\nimport evenflow as ef\nfrom ..learn import toys\nfrom .. import media",
        "cli.py": "import rich\nfrom . import claims\nfrom .api import open",
        "__main__.py": "from .cli import main",
    }
    assert check(tree(tmp_path, files)) == (0, [])
