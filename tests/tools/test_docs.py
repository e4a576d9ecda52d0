"""Documentation cannot rot: its code runs, its links lead somewhere, and the commands that it names exist."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import evenflow
from evenflow import memory
from evenflow.memory.layout import VERBS

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def blocks(page: Path, language: str = "python") -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def run(arguments: list[str | Path], folder: Path) -> str:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *sys.path])}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def run_all(examples: list[str], folder: Path) -> str:
    """Run programs one after the other in one process, each with names of its own: importing is what takes time."""
    names = [f"{number}.py" for number in range(len(examples))]
    for name, code in zip(names, examples, strict=True):
        (folder / name).write_text(code, encoding="utf-8")
    each = "import runpy, sys; [runpy.run_path(name, run_name='__main__') for name in sys.argv[1:]]"
    return run(["-c", each, *names], folder)


def test_the_examples_of_the_readme_run(tmp_path):
    said = run_all(blocks(ROOT / "README.md"), tmp_path)
    assert re.search(r"^\d+ frames, \d+ bytes held: a large blue square .* at night$", said, re.MULTILINE)
    assert re.search(r"^\d+ tokens read, \d+ bytes held$", said, re.MULTILINE)


@pytest.mark.parametrize("page", ["beyond.md", "schedules.md", "training.md", "verbs.md", "video.md", "world.md"])
def test_the_examples_of_a_page_run(tmp_path, page):
    run_all(blocks(ROOT / "docs" / page), tmp_path)


def test_the_recipe_of_contributing_passes_its_test_and_is_that_of_the_example(tmp_path):
    recipe, test, claim = blocks(ROOT / "CONTRIBUTING.md")
    for name, code in {"own_recipe": recipe, "test_own_recipe": test, "own_claim": claim}.items():
        (tmp_path / f"{name}.py").write_text(code, encoding="utf-8")
    assert "6 passed" in run(["-m", "pytest", "-q", "test_own_recipe.py"], tmp_path)
    measures = "import own_claim, own_recipe; from evenflow.claims import run; print(run('tova').holds)"
    assert run(["-c", measures], tmp_path) == "True\n"
    example = (ROOT / "examples" / "own_recipe.py").read_text(encoding="utf-8")
    definition = recipe[recipe.index("@dataclass") :].strip()
    assert definition in example


@by_page
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if not re.match(r"[a-z]+:", target):
            assert (page.parent / target.partition("#")[0]).exists(), f"{page.name} links to {target}"


@by_page
def test_commands_that_are_named_exist(page):
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    named = set(re.findall(r"(?:^|`)make ([a-z]+)", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert named <= targets


def test_make_help_lists_every_target():
    said = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert phony is not None
    assert set(re.findall(r"^make ([a-z]+) +\S", said, re.MULTILINE)) == set(phony.group(1).split())


def test_the_changelog_knows_this_version():
    assert f"## {evenflow.__version__} " in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_verbs_page_names_answers_that_exist():
    rows = re.findall(r"^\| \*\*\w+\*\* .*$", (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8"), re.MULTILINE)
    answers = [name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[3])]
    assert len(rows) == 5
    assert answers
    for name in answers:
        assert name in memory.__all__


def test_the_verbs_page_lists_every_answer_and_the_recipes_that_use_it():
    page = (ROOT / "docs" / "verbs.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\w+) \| `(\w+)` \| (\S.*) \| (\S.*) \|$", page, re.MULTILINE)
    listed = {(verb, name): users for verb, name, _, users in rows}
    assert len(listed) == len(rows)
    standard, expected = evenflow.Memory(window=1), {}
    for verb, base in VERBS.items():
        for name, answer in vars(memory).items():
            if isinstance(answer, type) and issubclass(answer, base) and answer is not base:
                users = [f"`{info.name}`" for info in evenflow.recipes() if uses(info.name, verb, answer)]
                default = type(getattr(standard, verb)) is answer
                expected[verb, name] = "the default" if default else ", ".join(users) or "–"
    assert listed == expected


def uses(recipe: str, verb: str, answer: type) -> bool:
    """Whether a recipe gives this answer, or may give it under other parameters: its file names it."""
    module = import_module(f"evenflow.recipes.{recipe.replace('-', '_')}")
    return type(getattr(evenflow.recipe(recipe), verb, None)) is answer or answer in vars(module).values()


def test_the_readme_lists_every_recipe():
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == [info.name for info in evenflow.recipes()]
