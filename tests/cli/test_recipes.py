"""`evenflow recipes NAME`, `evenflow claims compare`, and which recipes read a text."""

import io
import json

import pytest
from rich.cells import cell_len
from rich.console import Console

import evenflow as ef
from evenflow.claims.result import Result, Row
from evenflow.cli.describing import described, layout, traits, verdicts
from evenflow.memory import Absolute, LastByModality, LastSeconds, Memory, Never, Oldest
from evenflow.models import unfit
from evenflow.recipes.registry import WHAT, documentation

from ..recipes.cases import CASES
from .test_command import SENTENCES, evenflow

EVERY = sorted(info.name for info in ef.recipes("memory"))
OTHERS = sorted({info.name for info in ef.recipes()} - {*EVERY})
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
        (Memory(evict=LastSeconds(30.0)), "[ sink 0 | memory 0 | held what LastSeconds keeps ] + fresh"),
        (Memory(window=9, evict=LastByModality({0: 4})), "[ sink 0 | memory 0 | window 9 tokens by LastByModality ] + fresh"),
        (ef.recipe("recompute", window=9), "[ sink 0 | memory 0 | window 9 tokens, the fresh ones among them ]"),
        (ef.recipe("infinite-vggt"), "[ sink 1 frame | memory 0 | held what LeastDiverse keeps ] + fresh"),
        (ef.recipe("anchor-forcing"), "[ sink 3 frames | memory 6 frames | window 9 frames, the fresh ones among them ]"),
        (
            ef.recipe("hybrid-forcing"),
            "[ sink 3 frames | memory a state of one size | window 6 frames, the fresh ones among them ]",
        ),
        (
            ef.recipe("deep-forcing"),
            "[ sink 10 frames | memory 0 | window 11 frames by LeastAttended, the fresh ones among them ]",
        ),
        (
            ef.recipe("reward-forcing"),
            "[ sink 3 frames, which take in what leaves | memory 0 | window 6 frames, the fresh ones among them ]",
        ),
        (ef.recipe("live-vlm"), "[ sink 14 tokens | memory 0 | held everything, less what Thinned takes out ] + fresh"),
        (ef.recipe("temp-cache"), "[ sink 0 | memory 0 | held everything, less what Merged takes out ] + fresh"),
        (
            ef.recipe("temp-cache", window=4),
            "[ sink 0 | memory 0 | window 4 frames, less what Merged takes out ] + fresh",
        ),
    ],
)  # fmt: skip
def test_a_layout_is_one_line(memory, drawn):
    assert layout(memory) == layout(memory, 120) == drawn


def test_a_layout_that_is_too_long_has_a_line_for_every_region():
    drawn = layout(ef.recipe("hybrid-forcing"), 76)
    assert drawn == ("[ sink 3 frames\n| memory a state of one size\n| window 6 frames, the fresh ones among them ]")


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("width", [80, 120])
def test_a_recipe_in_full(name, width, tmp_path):
    (info,) = (info for info in ef.recipes() if info.name == name)
    memory, out = ef.recipe(name), io.StringIO()
    for claim in info.claims:
        Result(claim, "Sums.", (Row("a", "1", "2", False, "too little"),), 1.0, "here").save(tmp_path)
    Console(file=out, width=width).print(described(memory, info, documentation(name), tmp_path, width))
    shown = out.getvalue()
    assert all(cell_len(line) <= width for line in shown.splitlines())
    drawn = [line for line in shown.splitlines() if line.startswith(("    [ sink", "    | "))]
    assert " ".join(" ".join(drawn).split()) == layout(memory), "its lines are not broken"
    flat = " ".join(shown.split())
    assert info.paper in flat and info.summary in flat
    assert all(f"{verb} {answer}" in flat for verb, answer in info.verbs.items())
    assert all(f"{key}={value!r}" in flat for key, value in info.defaults.items())
    assert all(
        f"{claim} 0 of 1 promises hold NOT a: 2, where the paper has 1 (too little)" in flat for claim in info.claims
    )
    assert ("a text is read one token a step" in flat) == (memory.inside == "causal" and not memory.cut_free)
    assert ("A question also reads" in flat) == memory.retrieves
    assert ("so no text is read" in flat) == (name not in READERS)


@pytest.mark.parametrize("name", OTHERS)
def test_a_recipe_of_another_kind_in_full(name, tmp_path):
    (info,) = (info for info in ef.recipes() if info.name == name)
    out = io.StringIO()
    Console(file=out, width=90).print(described(ef.recipe(name), info, documentation(name), tmp_path, 90))
    flat = " ".join(out.getvalue().split())
    assert all(cell_len(line) <= 90 for line in out.getvalue().splitlines())
    assert info.paper in flat and info.summary in flat and WHAT[info.kind] in flat
    assert all(f"{verb} {answer}" in flat for verb, answer in info.verbs.items())
    done = evenflow("read", "-", "--memory", name, stdin=SENTENCES[0])
    assert done.returncode == 2 and f"{name} is {WHAT[info.kind]}" in done.stderr


def test_a_memory_that_needs_a_tag_says_so():
    assert "Every token has to say its time (the tag 'time')." in traits(Memory(evict=LastSeconds(3.0)))


def test_a_recipe_with_parameters_and_a_wrong_one():
    assert layout(ef.recipe("longlive")) in evenflow("recipes", "longlive").stdout
    assert "| window 60 tokens ]" in evenflow("recipes", "streaming-llm(window=60)").stdout
    assert json.loads(evenflow("recipes", "window", "--json").stdout)["name"] == "window"
    done = evenflow("recipes", "streming-llm")
    assert done.returncode == 2 and "did you mean 'streaming-llm'" in done.stderr


def test_the_last_verdict_of_a_claim(tmp_path):
    rows = (
        Row("a", "1", "1", True),
        Row("b", "1", "2", False),
        Row("c", "–", "3"),
        Row("d", "≤ 1", "5", False, "slow"),
    )
    Result("sums", "Sums.", rows, 1.0, "here").save(tmp_path)
    assert verdicts(("sums", "others"), tmp_path) == [
        ("sums", "1 of 3 promises hold"),
        ("", "NOT b: 2, where the paper has 1"),
        ("", "NOT d: 5, where the paper has ≤ 1 (slow)"),
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
