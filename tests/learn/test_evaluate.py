"""Measuring a model on text: the figures are those of the definition, and bad input is told in one line."""

import json
import math
import subprocess
import sys

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import evenflow as ef
from evenflow.learn.corpus import text_files, train_tokenizer
from evenflow.learn.evaluate import evaluate, main, spread
from evenflow.learn.pretrain import Recipe, build_model, export

TINY = Recipe(vocabulary=300, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=32, context=32)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder of text with characters of several bytes, and a folder of an untrained model for it."""
    root = tmp_path_factory.mktemp("evaluate")
    (root / "a.txt").write_text("".join(f"Line {n}: the boat — Ann's — came in, naïve as ever.\n" for n in range(60)))
    tokenizer = train_tokenizer(text_files(root), 300)
    export(build_model(TINY), tokenizer, root / "model")
    return root


def run(*arguments):
    """The command in this process, which keeps its number of threads."""
    command, threads = typer.Typer(), torch.get_num_threads()
    command.command()(main)
    try:
        return CliRunner().invoke(command, [*map(str, arguments)])
    finally:
        torch.set_num_threads(threads)


def test_figures_are_those_of_the_whole_text(made):
    """Samples cover the text up to the last part, so their bytes are the text's; the loss is a full memory's."""
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32)
    ids, size = spread(text_files(made), tokenizer, 32, 10**6)
    text = (made / "a.txt").read_text().encode()
    assert (ids[:, 0] == tokenizer.bos_token_id).all()
    assert 0 <= len(text) - size < 31 * 12
    assert text.startswith(tokenizer.decode(ids[:, 1:].flatten()).rstrip("\ufffd").encode())
    found = evaluate(model, ids[:9], size, batch=4)
    nats = ef.open(model, memory="full", batch=9).surprisal(ids[:9])
    expected = float(nats[:, 1:].double().mean())
    assert found.nats_per_token == pytest.approx(expected, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert found.nats_per_byte * size == pytest.approx(found.nats_per_token * found.tokens)


def test_a_memory_reads_every_sample_from_nothing(made):
    model = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32)
    ids, size = spread(text_files(made), AutoTokenizer.from_pretrained(made / "model"), 32, 5)
    memory = ef.recipe("window", window=6)
    found, dense = evaluate(model, ids, size, memory, batch=2), evaluate(model, ids, size)
    expected = [float(ef.open(model, memory).surprisal(row)[0, 1:].double().mean()) for row in ids]
    assert found.nats_per_token == pytest.approx(sum(expected) / 5, rel=1e-5)
    assert abs(found.nats_per_token - dense.nats_per_token) > 1e-5
    full = evaluate(model, ids, size, ef.recipe("full"))
    assert full.nats_per_token == pytest.approx(dense.nats_per_token, rel=1e-6)


def test_few_samples_are_spread_over_the_text(made):
    tokenizer = AutoTokenizer.from_pretrained(made / "model")
    every, _ = spread(text_files(made), tokenizer, 32, 10**6)
    few, _ = spread(text_files(made), tokenizer, 32, 4)
    assert few.shape == (4, 32)
    assert torch.equal(few, every[[k * len(every) // 4 for k in range(4)]])


def test_command_prints_one_line_of_json(made):
    command = [sys.executable, "-m", "evenflow.learn.evaluate", str(made / "model"), "--data", str(made), "--json"]
    command += ["--samples", "5", "--memory", "window(window=6)"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["samples"] == 5 and found["context"] == 32 and found["tokens"] == 155
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    assert len(found["sink_share"]) == 2 and all(0 < share < 1 for share in found["sink_share"])


def test_an_unknown_memory_is_one_line(made):
    done = run(made / "model", "--data", made, "--memory", "windw(window=6)")
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and "window" in done.stderr and done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "model, data, words",
    [
        ("nowhere", ".", "not the folder of a model"),
        ("model", "nowhere", "is not a folder"),
        ("model", "model", "no (non-empty) .txt files"),
    ],
)
def test_bad_input_is_one_line(made, model, data, words):
    done = run(made / model, "--data", made / data)
    assert done.exit_code == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
