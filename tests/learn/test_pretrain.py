"""Training a model for streams: text in, the same text out; samples; the schedule; exact resume; a model that opens."""

import json
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
import typer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import evenflow as ef
from evenflow.learn.corpus import COPY, SINK, Samples, encode_files, text_files, train_tokenizer, windows
from evenflow.learn.pretrain import Recipe, Trainer, export, learning_rate, main, pretrain, sink_share, validate

TINY = Recipe(vocabulary=300, hidden=16, layers=2, heads=2, kv_heads=1, intermediate=32, context=32, batch=2, steps=6)
PROSE = "The boat went out, and the boat came in; and nobody asked where it had been — not even Ann.\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("books")
    for n in range(3):
        (folder / f"{n}.txt").write_text("".join(f"{PROSE[:40]}{line} {PROSE[40:]}" for line in range(n, n + 80)))
    return folder


@pytest.fixture
def command():
    threads, app = torch.get_num_threads(), typer.Typer()
    app.command()(main)
    yield app
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer(folder):
    return train_tokenizer(text_files(folder), 300)


@pytest.fixture(scope="module")
def tokens(folder, tokenizer, tmp_path_factory):
    return encode_files(tokenizer, text_files(folder), tmp_path_factory.mktemp("tokens") / "a.tokens")


@settings(max_examples=50)
@given(text=st.text(st.characters(exclude_categories=("Cs",))))
def test_any_text_comes_back_as_it_was(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == text


def test_tokens_of_a_folder_are_those_of_its_files(folder, tokenizer, tokens):
    assert (tokenizer.token_to_id(SINK), tokenizer.token_to_id(COPY)) == (0, 1)
    assert tokenizer.decode(tokens.tolist()) == "".join(path.read_text() for path in text_files(folder))
    assert tokens.dtype == np.uint16


def test_samples_begin_with_the_sink_and_depend_on_seed_and_step_alone(tokens):
    samples = Samples(tokens, context=20, batch=3)
    batch = samples[5]
    assert batch.shape == (3, 20) and (batch[:, 0] == 0).all() and (batch[:, 1:] > 1).all()
    assert torch.equal(batch, Samples(tokens, context=20, batch=3)[5])
    assert not torch.equal(batch, samples[6]) and not torch.equal(batch, Samples(tokens, 20, 3, seed=1)[5])
    whole = tokens.tolist()
    for row in batch[:, 1:].tolist():
        assert any(whole[at : at + 19] == row for at in range(len(whole) - 18))
    with pytest.raises(ValueError, match="one sample needs 19"):
        _ = Samples(tokens[:10], 20, 3)[0]


def test_back_copy_marks_are_followed_by_the_token_before_them(tokens):
    marks = 0
    for row in Samples(tokens, context=64, batch=8, copies=1.0)[0].tolist():
        for at in range(2, 63):
            if row[at] == 1 and at + 1 < 64:
                marks += 1
                assert row[at + 1] == row[at - 1]
    assert marks > 10


def test_windows_cut_text_into_samples(tokens):
    cut = windows(tokens, 16)
    assert cut.shape == (len(tokens) // 15, 16) and (cut[:, 0] == 0).all()
    assert cut[:, 1:].flatten().tolist() == tokens[: cut[:, 1:].numel()].tolist()


def test_the_learning_rate_warms_up_stays_and_decays():
    recipe = Recipe(learning_rate=1.0, warmup=10, decay=0.5)
    rates = [learning_rate(recipe, step, step / 100) for step in range(100)]
    assert rates[0] == 0.1 and rates[9] == 1.0 and set(rates[9:50]) == {1.0}
    assert rates[51:] == sorted(rates[51:], reverse=True) and 0 < rates[-1] < 0.05
    assert learning_rate(Recipe(learning_rate=1.0, warmup=0, decay=0.0), 0, 1.0) == 1.0


def test_a_resumed_run_is_the_run(tokens, tmp_path):
    samples = Samples(tokens, TINY.context, TINY.batch, copies=0.5)
    whole, first, second = (Trainer(TINY, samples) for _ in range(3))
    losses = [whole.train_step() for _ in range(6)]
    again = [first.train_step() for _ in range(3)]
    first.save(tmp_path / "run.safetensors")
    second.load(tmp_path / "run.safetensors")
    again += [second.train_step() for _ in range(3)]
    assert losses == again and second.step == 6 and second.done == 1.0
    for one, other in zip(whole.model.parameters(), second.model.parameters(), strict=True):
        assert torch.equal(one, other)
    other = Trainer(Recipe(**{**vars(TINY), "learning_rate": 1.0}), samples)
    with pytest.raises(ValueError, match="learning_rate"):
        other.load(tmp_path / "run.safetensors")


def test_training_learns_and_exports_a_model_that_opens(folder, tmp_path):
    recipe = Recipe(**{**vars(TINY), "steps": 40, "batch": 8, "warmup": 4, "learning_rate": 1e-2})
    line = pretrain(recipe, folder, tmp_path / "run", None, False, 20)
    curve = [json.loads(text) for text in (tmp_path / "run" / "curve.jsonl").read_text().splitlines()]
    assert [point["step"] for point in curve] == [20, 40] and curve[-1] == line
    assert curve[1]["valid_nats"] < curve[0]["valid_nats"] < 6
    assert len(line["sink_share"]) == 2 and all(0 < share < 1 for share in line["sink_share"])

    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "model")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "model")
    assert model.dtype is torch.bfloat16 and tokenizer.bos_token == SINK
    ids = tokenizer(PROSE)["input_ids"]
    assert tokenizer.bos_token_id not in ids and tokenizer.decode(ids) == PROSE
    stream = ef.open(tmp_path / "run" / "model", "streaming-llm(sink=1, window=20)", dtype=torch.float32)
    assert stream.surprisal([0, *ids])[0, 1:].isfinite().all()

    with pytest.raises(ValueError, match="--resume"):
        pretrain(recipe, folder, tmp_path / "run", None, False, 20)
    with pytest.raises(ValueError, match="ended at step 40"):
        pretrain(recipe, folder, tmp_path / "run", None, True, 20)
    with pytest.raises(ValueError, match="valid changed"):
        pretrain(recipe, folder, tmp_path / "run", folder, True, 20)
    longer = Recipe(**{**vars(recipe), "steps": 45})
    assert pretrain(longer, folder, tmp_path / "run", None, True, 20)["step"] == 45


def test_a_run_that_diverges_leaves_the_last_checkpoint_and_model(folder, tmp_path, monkeypatch):
    """Weights lost in the step of a checkpoint, and weights lost between two, which stops the run one step later."""
    step = Trainer.train_step

    def lost_at(number):
        def train_step(trainer):
            loss = step(trainer)
            if trainer.step == number:
                with torch.no_grad():
                    trainer.model.model.norm.weight.fill_(math.nan)
            return loss

        return train_step

    files = ("checkpoint.safetensors", "model/model.safetensors", "curve.jsonl")
    pretrain(Recipe(**{**vars(TINY), "steps": 2}), folder, tmp_path, None, False, 2)
    kept = [(tmp_path / name).read_bytes() for name in files]
    for number, save_every, told in ((4, 2, 4), (3, 6, 4)):
        monkeypatch.setattr(Trainer, "train_step", lost_at(number))
        with pytest.raises(ValueError, match=f"loss is nan at step {told}"):
            pretrain(TINY, folder, tmp_path, None, True, save_every)
        assert [(tmp_path / name).read_bytes() for name in files] == kept


def test_tokens_of_another_text_are_not_used(folder, tmp_path):
    pretrain(TINY, folder, tmp_path / "run", None, False, 6)
    (tmp_path / "run" / "checkpoint.safetensors").unlink()
    other = tmp_path / "other"
    other.mkdir()
    (other / "0.txt").write_text("Something else.\n" * 200)
    with pytest.raises(ValueError, match="data changed"):
        pretrain(TINY, other, tmp_path / "run", None, False, 6)
    with pytest.raises(ValueError, match="vocabulary changed"):
        pretrain(Recipe(**{**vars(TINY), "vocabulary": 290}), folder, tmp_path / "run", None, False, 6)
    (other / "0.txt").write_text("Short.\n")
    with pytest.raises(ValueError, match="one sample needs 31"):
        pretrain(TINY, folder, tmp_path / "short", other, False, 6)


def test_a_cut_checkpoint_is_told(tokens, tmp_path):
    trainer, path = Trainer(TINY, Samples(tokens, TINY.context, TINY.batch)), tmp_path / "run.safetensors"
    trainer.train_step()
    trainer.save(path)
    before = [parameter.clone() for parameter in trainer.model.parameters()]
    content = path.read_bytes()
    for size in (0, 5, 100, len(content) - 1):
        path.write_bytes(content[:size])
        with pytest.raises(ValueError, match="not the whole checkpoint"):
            trainer.load(path)
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))


def test_validation_and_sink_share_leave_the_model_as_it_was(tokens, tokenizer, tmp_path):
    trainer = Trainer(TINY, Samples(tokens, TINY.context, TINY.batch))
    before, attention = [p.clone() for p in trainer.model.parameters()], trainer.model.config._attn_implementation
    samples = windows(tokens, TINY.context)[:5]
    assert validate(trainer.model, samples, 2) == pytest.approx(validate(trainer.model, samples, 5), rel=1e-3)
    sink_share(trainer.model, samples)
    assert trainer.model.training and trainer.model.config._attn_implementation == attention
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True))
    export(trainer.model, tokenizer, tmp_path / "model")
    assert next(trainer.model.parameters()).dtype is torch.float32


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{tmp}", "--out", "{tmp}/out"], "no (non-empty) .txt files"),
        (["--data", "{books}", "--out", "{tmp}/out", "--resume"], "nothing to resume"),
        (["--data", "{books}", "--out", "{tmp}/out", "--heads", "3"], "does not give 3 heads"),
        (["--data", "{books}", "--out", "{tmp}/out", "--kv-heads", "3"], "cannot share 3 key heads"),
        (["--data", "{books}", "--out", "{books}/0.txt"], "0.txt"),
    ],
)
def test_bad_input_is_one_line(arguments, message, command, tmp_path, folder):
    done = CliRunner().invoke(command, [argument.format(tmp=tmp_path, books=folder) for argument in arguments])
    assert done.exit_code == 2 and message in done.stderr and done.stderr.startswith("error: ")
    assert len(done.stderr.strip().splitlines()) == 1


def test_the_help_names_what_can_be_set(command):
    done = CliRunner().invoke(command, ["--help"], env={"COLUMNS": "200", "NO_COLOR": "1"})
    assert done.exit_code == 0 and "on a folder of text" in done.stdout
    for word in ("--data", "--valid", "--minutes", "--weight-decay", "--resume"):
        assert word in done.stdout


def test_the_module_is_a_command(tmp_path):
    arguments = ["--data", str(tmp_path / "none"), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "evenflow.learn.pretrain", *arguments], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 2 and "is not a folder" in done.stderr and done.stderr.count("\n") == 1
