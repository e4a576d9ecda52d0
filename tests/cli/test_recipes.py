"""`evenflow recipes NAME`, `evenflow claims compare`, and which recipes read a text."""

import json

import pytest

import evenflow as ef
from evenflow.claims.result import Result, Row
from evenflow.cli.describing import layout, verdicts
from evenflow.memory import Absolute, Memory, Never, Oldest
from evenflow.models import unfit

from ..recipes.cases import CASES
from .test_command import SENTENCES, evenflow

EVERY = sorted(info.name for info in ef.recipes())
READERS = [name for name in EVERY if unfit(ef.recipe(name)) is None]


@pytest.mark.parametrize(
    ("memory", "drawn"),
    [
        (Memory(sink=4, window=2044), "[ sink 4 tokens | memory 0 | window 2,044 tokens ] + fresh"),
        (Memory(), "[ sink 0 | memory 0 | held everything ] + fresh"),
        (
            Memory(sink=1, window=9, frame=None, inside="both", evict=Oldest(with_fresh=True), place=Absolute()),
            "[ sink 1 frame | memory 0 | window 9 frames, the fresh ones among them ]",
        ),
        (Memory(frame=7, evict=Never(), place=Absolute()), "[ sink 0 | memory 0 | held everything ] + fresh"),
        (ef.recipe("infinite-vggt"), "[ sink 1 frame | memory 0 | held what LeastDiverse keeps ] + fresh"),
        (ef.recipe("anchor-forcing"), "[ sink 3 frames | memory 6 frames | window 9 frames, the fresh ones among them ]"),
        (
            ef.recipe("hybrid-forcing"),
            "[ sink 3 frames | memory of LinearState | window 6 frames, the fresh ones among them ]",
        ),
    ],
)  # fmt: skip
def test_a_layout_is_one_line(memory, drawn):
    assert layout(memory) == drawn


@pytest.mark.parametrize("name", sorted(info.name for info in ef.recipes()))
def test_a_recipe_in_full(name):
    (info,) = (info for info in ef.recipes() if info.name == name)
    done = evenflow("recipes", name)
    assert done.returncode == 0, done.stderr
    flat = " ".join(done.stdout.split())
    assert info.paper in flat and layout(ef.recipe(name)) in flat and info.summary in flat
    assert all(f"{verb} {answer}" in flat for verb, answer in info.verbs.items())
    assert all(f"{key}={value!r}" in flat for key, value in info.defaults.items())
    assert all(f"\n{claim} " in done.stdout for claim in info.claims)


def test_a_recipe_with_parameters_and_a_wrong_one():
    assert "| window 60 tokens ]" in evenflow("recipes", "streaming-llm(window=60)").stdout
    assert json.loads(evenflow("recipes", "window", "--json").stdout)["name"] == "window"
    done = evenflow("recipes", "streming-llm")
    assert done.returncode == 2 and "did you mean 'streaming-llm'" in done.stderr


def test_the_last_verdict_of_a_claim(tmp_path):
    rows = (Row("a", "1", "1", True), Row("b", "1", "2", False), Row("c", "–", "3"))
    Result("sums", "Sums.", rows, 1.0, "here").save(tmp_path)
    assert verdicts(("sums", "others"), tmp_path) == [
        ("sums", "1 of 2 promises hold; NOT: b (2)"),
        ("others", "not measured here yet: evenflow claims run others"),
    ]


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("command", ["read", "write"])
def test_every_memory_reads_and_writes_text_or_says_why_not(name, command):
    """With its defaults, and at a size that the text outgrows."""
    for memory in (name, ef.recipe(name, **CASES[name].params).spec):
        if command == "read":
            done = evenflow("read", "-", "--memory", memory, "--json", stdin=SENTENCES[0])
        else:
            done = evenflow("write", "--memory", memory, "--tokens", "3", "--prompt", SENTENCES[0])
        if name in READERS and name != "learned-sink":
            assert done.returncode == 0, done.stderr
            assert (json.loads(done.stdout)["tokens"] > 15) if command == "read" else SENTENCES[0] in done.stdout
            continue
        assert done.returncode == 2 and not done.stdout
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"evenflow: {name} ")
        if name == "learned-sink":  # the shipped model brings no logits
            assert line.endswith("`window` keeps the same tokens without them")
        else:
            assert "cannot read text: it is for chunks of video" in line
            assert line.endswith(f"use one of {', '.join(READERS)}")


def test_some_memories_compared(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = evenflow("claims", "compare", "window", "self-forcing")
    assert done.returncode == 0, done.stderr
    assert "self-forcing" in done.stdout and "watched" in done.stdout and len(done.stderr.splitlines()) == 2
    assert not list(tmp_path.iterdir())
    done = evenflow("claims", "compare", "windw")
    assert done.returncode == 2 and "did you mean 'window'" in done.stderr
