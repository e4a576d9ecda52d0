"""What Evenflow is timed against computes the right thing, and the benchmarks run and write what they say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import evenflow as ef
from benchmarks import recipes, rivals
from benchmarks.showing import tables
from benchmarks.timing import interleaved, ratio
from evenflow.memory.attention import softmax_attention
from evenflow.memory.rope import Rotary

SINK, WINDOW = 4, 28


@pytest.fixture(scope="module")
def model():
    return rivals.llama(layers=2, hidden=64, heads=2, vocabulary=100)


@pytest.fixture(scope="module")
def ids():
    return torch.randint(0, 100, (1, SINK + WINDOW + 40), generator=torch.Generator().manual_seed(0))


def read_on(read, ids):
    return torch.cat([read(ids[:, t : t + 1]) for t in range(SINK + WINDOW, ids.shape[1])], 1)


def test_raw_keys_are_the_same_method(model, ids):
    prompt = ids[:, : SINK + WINDOW]
    ours = read_on(rivals.evenflow(model, f"streaming-llm(sink={SINK}, window={WINDOW})", prompt), ids)
    assert torch.allclose(read_on(rivals.raw_keys(model, SINK, WINDOW, prompt), ids), ours, atol=1e-5)


def test_the_growing_cache_is_full_attention(model, ids):
    ours = read_on(rivals.evenflow(model, "full", ids[:, : SINK + WINDOW]), ids)
    assert torch.allclose(read_on(rivals.dynamic(model, ids[:, : SINK + WINDOW]), ids), ours, atol=1e-5)


def test_the_sliding_cache_is_a_window(model, ids):
    # Their window counts the token itself.
    ours = read_on(rivals.evenflow(model, f"window(window={WINDOW - 1})", ids[:, : SINK + WINDOW]), ids)
    assert torch.allclose(read_on(rivals.sliding(model, WINDOW, ids[:, : SINK + WINDOW]), ids), ours, atol=1e-5)


def test_recomputation_sees_the_last_tokens_only(model, ids):
    again = ef.open(model, f"recompute(window={WINDOW})")
    again.consume(ids[:, : SINK + WINDOW])
    theirs = read_on(rivals.recomputed(model, WINDOW, ids[:, : SINK + WINDOW]), ids)
    assert torch.allclose(theirs, read_on(again.feed, ids), atol=1e-5)


def test_bare_buffers_run_the_same_model(model, ids):
    config = model.config
    read = rivals.bare(model, 9)
    assert read(ids[:, :1]).shape == (1, 1, config.vocab_size) and model.config._attn_implementation != rivals.STATIC


def test_turns_are_taken_and_compared():
    calls = []
    seconds = interleaved({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, warmup=1)
    assert calls == ["a", "b", "a", "b", "b", "a"] and [len(times) for times in seconds.values()] == [2, 2]
    assert ratio({"a": [1.0, 4.0, 9.0], "b": [1.0, 2.0, 3.0]}, "a", "b") == 2.0


def test_time_counts_where_it_is_spent():
    assert all(Path(file).exists() for file in recipes.KNOWN)
    x = torch.randn(1, 4, 512, 32)
    rotary = Rotary(ef.Rope(), 32, x.dtype, x.device)
    turn = rotary.at(torch.arange(512))
    shares = {
        "attention": recipes.parts(lambda: softmax_attention(x, x, x, None, 0.1, None), 5),
        "rotation": recipes.parts(lambda: rotary.rotate(x, *turn), 5),
    }
    assert all(share[name] > 0.9 and sum(share.values()) == pytest.approx(1) for name, share in shares.items())
    assert recipes.allocated(lambda: torch.empty(1000), 3) == 4000


def test_every_recipe_is_compared_over_as_many_tokens_as_it_attends():
    got = recipes.measure(
        frames=(8,), budget=12, heads=2, dim=16, rounds=2, names=("dvgt2", "motionstream", "streaming-vlm", "window"),
        say=lambda text: None,
    )  # fmt: skip
    frames, single = got["cases"].values()
    assert set(frames) == {"dvgt2", "motionstream", "streaming-vlm", "window"}
    assert set(single) == {"streaming-vlm", "window"}  # the others bring whole frames
    # Twelve frames, the three fresh ones among them; on the ring as many tokens and the query itself.
    assert (frames["dvgt2"]["attended"], frames["motionstream"]["attended"], frames["window"]["attended"]) == (
        96,
        96,
        97,
    )
    for row in (*frames.values(), *single.values()):
        assert sum(row["parts"].values()) == pytest.approx(1)
        assert min(row["times"].values()) > 0 and row["allocated"] > 0
    (first, second) = tables("recipes", got)
    assert first.row_count == 4 and second.row_count == 2


def test_the_command_measures_and_writes(tmp_path):
    command = [sys.executable, "-m", "benchmarks", "bookkeeping", "growth", "--quick", "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "share of bookkeeping" in done.stdout and "position" in done.stdout
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["quick"] and set(results) == {"machine", "quick", "bookkeeping", "growth"}
    held = results["growth"]["bytes"]
    assert len(set(held["streaming-llm(sink=4, window=252)"])) == 1 and len(set(held["full"])) > 1
    assert (tmp_path / "results.png").read_bytes().startswith(b"\x89PNG")
