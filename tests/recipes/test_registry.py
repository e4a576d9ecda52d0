"""Recipes are found by name, described, and refused with the nearest right name."""

import ast
from pathlib import Path

import pytest
import torch

import evenflow as ef
from evenflow import memory, recipes
from evenflow.memory import Memory, admission, features
from evenflow.recipes import composed, parse, register
from evenflow.recipes.registry import WHAT

NAMES = ["full", "learned-sink", "recompute", "streaming-llm", "window", "zero-sink"]


def test_the_table():
    infos = ef.recipes()
    assert [info.name for info in infos if info.name in NAMES] == NAMES
    for info in infos:
        assert set(info.verbs) == {"admit", "evict", "fold", "recall", "place"}
        assert info.summary.endswith(".") and "arXiv" in info.paper
        assert ef.recipe(info.name, **info.defaults) == ef.recipe(info.name)


@pytest.mark.parametrize(
    ("spec", "sink", "window"),
    [
        ("streaming-llm", 4, 2044),
        ("streaming-llm()", 4, 2044),
        (" streaming-llm( sink = 8,window=1020 ) ", 8, 1020),
        ("window(window=64)", 0, 64),
        ("full", 0, None),
    ],
)
def test_specs(spec, sink, window):
    memory = parse(spec)
    assert (memory.sink, memory.window) == (sink, window)
    assert parse(memory.spec) == memory


@pytest.mark.parametrize("info", [info for info in ef.recipes() if info.kind != "memory"], ids=lambda info: info.name)
def test_other_kinds_are_composed_and_not_taken_for_a_memory(info):
    made = composed(info.name)
    assert made.kind == info.kind and composed(made.spec) == made and made.outline
    assert [one.name for one in ef.recipes(info.kind)].count(info.name) == 1
    with pytest.raises(ValueError, match=f"{info.name} is {WHAT[info.kind]}"):
        parse(info.name)


def test_the_spec_names_what_was_built():
    assert ef.recipe("streaming-llm", sink=2, window=9).spec == "streaming-llm(sink=2, window=9)"
    assert ef.recipe("full").spec == "full"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("streaming-lm", "did you mean 'streaming-llm'"),
        ("streaming_llm", "did you mean 'streaming-llm'"),
        ("nothing-like-it", "nothing-like-it'; there are anchor-forcing"),
        ("", "no recipe ''"),
        ("streaming-llm(sinks=4)", "did you mean 'sink'"),
        ("full(window=3)", "takes no parameters"),
        ("streaming-llm(4)", "every parameter with its name"),
        ("streaming-llm(sink=4", "does not end with a bracket"),
        ("streaming-llm(sink=)", "cannot read"),
        ("streaming-llm(**{})", "every parameter with its name"),
        ("streaming-llm(sink=4), window(window=3)", "every parameter with its name"),
        ("streaming-llm(sink=__import__('os'))", "is not a number"),
        ("streaming-llm(sink=-4)", "streaming-llm: sink is -4"),
        ("streaming-llm(sink='4')", "streaming-llm: sink is '4'"),
        ("window(window=0)", "window: window is 0"),
    ],
)
def test_wrong_specs(spec, message):
    with pytest.raises(ValueError, match="(?s)" + message.replace("(", r"\(").replace("*", r"\*")):
        parse(spec)


def test_a_name_is_taken_once_and_parameters_have_defaults():
    with pytest.raises(ValueError, match="exists already"):
        register("full", paper="")(lambda: Memory())
    with pytest.raises(TypeError, match="keyword-only with a default"):
        register("new", paper="")(lambda sink: Memory())


@pytest.mark.parametrize("name", NAMES)
def test_every_recipe_attends(name):
    memory = ef.recipe(name)
    logits = torch.zeros(1, 2) if memory.null == "learned" else None
    state = memory.build(layers=1, heads=2, head_dim=4, sink_logits=logits)
    with state.step(3):
        assert state.attend(0, *(torch.randn(1, 2, 3, 4) for _ in range(3))).shape == (1, 2, 3, 4)


def test_unknown_names_of_the_package():
    with pytest.raises(AttributeError, match="no attribute 'opne'"):
        _ = ef.opne
    assert "open" in dir(ef)


FILES = sorted(
    set(Path(recipes.__file__).parent.glob("*.py")) - {Path(recipes.__file__), Path(recipes.registry.__file__)}
)
MOST_LINES = 80
# Modules of the memory room that are no answers and no core: what a recipe may use beside the room's own names.
HELPERS = {"hashing", "mass"}
OFFERED = {"memory": memory, "memory.admission": admission, "memory.features": features}


def test_every_recipe_has_a_file_of_its_name():
    assert {path.stem.replace("_", "-") for path in FILES} == {info.name for info in ef.recipes()}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_recipe_is_short_and_made_of_answers(path):
    """Comments and imports count as lines, docstrings do not; what is imported are answers, and nothing of the core."""
    text = path.read_text(encoding="utf-8")
    tree, about = ast.parse(text), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node) is not None:
            about |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    lines = [line for number, line in enumerate(text.splitlines(), 1) if line.strip() and number not in about]
    assert len(lines) <= MOST_LINES
    for node in ast.walk(tree):
        assert not (isinstance(node, ast.Attribute) and node.attr.startswith("_")), f"{path.name}:{node.lineno}"
        named = [alias.name for alias in node.names] if isinstance(node, ast.Import | ast.ImportFrom) else []
        if isinstance(node, ast.Import) or (isinstance(node, ast.ImportFrom) and not node.level):
            assert not any(name.startswith("evenflow") for name in (getattr(node, "module", None) or "", *named))
        if not isinstance(node, ast.ImportFrom) or not node.level:
            continue
        names = set(named)
        if node.module == "registry":
            assert node.level == 1 and names == {"register"}
        elif node.module in OFFERED:
            offered = set(OFFERED[node.module].__all__)
            assert names <= offered, f"{path.name} imports {names - offered}"
        else:
            assert node.module.removeprefix("memory.") in HELPERS, f"{path.name} reaches into {node.module}"
