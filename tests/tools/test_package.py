"""What the package promises to those who install it."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import evenflow

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
LINES = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
PINNED = dict(line.lower().split("==") for line in LINES if not line.startswith("#"))


def numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in version.split("."))


def test_the_public_names_are_these():
    names = [
        "Memory",
        "Rope",
        "__version__",
        "generate",
        "open",
        "recipe",
        "recipes",
        "resume",
        "resume_video",
        "video",
    ]
    assert sorted(evenflow.__all__) == names
    assert dir(evenflow) == names
    assert all(getattr(evenflow, name) is not None for name in names)


def test_the_function_keeps_its_name_beside_the_room_of_that_name():
    from evenflow.generate import VideoStream

    assert VideoStream.__module__ == "evenflow.generate.stream"
    assert callable(evenflow.generate) and evenflow.generate.__module__ == "evenflow.api"


def test_importing_the_package_loads_no_library():
    code = "import sys, evenflow; print(sorted({'torch', 'transformers', 'rich', 'matplotlib'} & set(sys.modules)))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"


def test_every_dependency_has_an_exact_version_within_its_range():
    extras = PROJECT["optional-dependencies"]
    wanted = PROJECT["dependencies"] + [entry for name in extras for entry in extras[name]]
    for entry in wanted:
        own = re.fullmatch(r"evenflow\[([\w-]+)\]", entry)
        if own:
            assert own[1] in extras, entry
            continue
        match = re.fullmatch(r"([\w-]+)(?:>=([\d.]+))?", entry)
        assert match, entry
        name, least = match.groups()
        assert name in PINNED, f"constraints.txt has no version of {name}"
        assert least is None or numbers(PINNED[name]) >= numbers(least), entry


def test_the_constraints_are_plain_versions():
    # A local suffix (+cpu) or an address would tie an installation to one machine.
    for name, version in PINNED.items():
        assert re.fullmatch(r"[\w.-]+", name)
        assert re.fullmatch(r"[\d.]+(?:post\d+|rc\d+)?", version), (name, version)
