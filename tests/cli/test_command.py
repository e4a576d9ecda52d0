"""The command as a user runs it: real processes, the shipped model, good and bad input."""

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import pytest
import torch
from transformers import AutoModelForCausalLM

import evenflow as ef
from evenflow.cli import main
from evenflow.models import tiny_path

SENTENCES = [
    "The harbour was quiet that morning, and the gulls walked about on the wet stones.",
    "She had written to her brother twice, but no answer had come from the north.",
    "“Then we shall go ourselves,” said the captain; “there is nothing else to be done.”",
    "A long road lay before them, and the rain had not stopped since noon.",
]
TEXT = "".join(f"{SENTENCES[n % 4]}{' ' + str(n) if n % 7 == 0 else ''}\n" for n in range(120))
SMALL = "streaming-llm(sink=4, window=60)"


@dataclass
class Done:
    """What a run of the command left."""

    returncode: int
    stdout: str
    stderr: str


def evenflow(*arguments, stdin="", **environment):
    """The command, in this process."""
    out, error = io.StringIO(), io.StringIO()
    with tempfile.TemporaryFile("w+") as given, pytest.MonkeyPatch.context() as patch:
        given.write(stdin)
        given.seek(0)
        for name, value in {"TERM": "xterm", **environment}.items():
            patch.setenv(name, value)
        for name, value in {"argv": ["evenflow", *arguments], "stdin": given, "stdout": out, "stderr": error}.items():
            patch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as leave:
            main()
    return Done(leave.value.code or 0, out.getvalue(), error.getvalue())


def process(*arguments, **environment):
    """The command as a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "evenflow", *arguments], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment}, stdin=subprocess.DEVNULL,
    )  # fmt: skip


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text(TEXT)
    return path


def summaries(output):
    return [line for line in map(json.loads, output.splitlines()) if line["kind"] == "summary"]


def test_help_is_quick_and_teaches():
    loaded = "import sys, evenflow.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded]).returncode == 0
    shown = process("--help", NO_COLOR="1")
    assert shown.returncode == 0 and "read" in shown.stdout and "write" in shown.stdout
    for command in ("read", "write", "recipes", "claims"):
        assert evenflow(command, "--help").returncode == 0
    assert "Examples" in evenflow("read", "--help").stdout


class TestRead:
    def test_memories_side_by_side_end_in_a_table_a_figure_and_two_sentences(self, book, tmp_path):
        figure = tmp_path / "curves.png"
        done = evenflow(
            "read", str(book), "--memory", SMALL, "--memory", "window(window=64)", "--memory", "full",
            "--figure", str(figure), "--surprise", "3", TERM="dumb",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert figure.read_bytes().startswith(b"\x89PNG")
        for text in (SMALL, "window(window=64)", "full", "perplexity", str(figure), "Most surprising lines"):
            assert text in done.stdout
        assert "held" in done.stdout.splitlines()[-2] and "predicted best" in done.stdout.splitlines()[-1]
        assert "\x1b" not in done.stdout + done.stderr

    def test_file_pipe_and_any_chunk_give_the_same_figures(self, book):
        outputs = [
            evenflow("read", str(book), "--json", "--memory", SMALL),
            evenflow("read", "-", "--json", "--memory", SMALL, stdin=TEXT),
            evenflow("read", str(book), "--json", "--memory", SMALL, "--chunk", "37"),
        ]
        first, *others = [summaries(done.stdout)[0] for done in outputs]
        assert first["tokens"] > 1500 and 1 < first["perplexity"] < 3000
        for other in others:
            assert other["tokens"] == first["tokens"]
            assert math.isclose(other["nats_per_token"], first["nats_per_token"], rel_tol=1e-5)

    def test_the_odd_line_is_found(self, book):
        lines = TEXT.splitlines(keepends=True)
        lines.insert(90, "xqj zvvk 0x8f3 %%% wqpfm jjjq\n")
        done = evenflow("read", "-", "--json", "--surprise", "2", "--memory", SMALL, stdin="".join(lines))
        odd = [line for line in map(json.loads, done.stdout.splitlines()) if line["kind"] == "surprise"]
        assert len(odd) == 2 and odd[0]["number"] == 91
        assert odd[0]["offset"] == len("".join(lines[:90]).encode())

    def test_a_saved_reading_goes_on_where_it_was(self, book, tmp_path):
        state = tmp_path / "state"
        whole = summaries(evenflow("read", str(book), "--json").stdout)[0]
        part = evenflow("read", str(book), "--json", "--limit", "700", "--save", str(state))
        assert summaries(part.stdout)[0]["tokens"] < whole["tokens"]
        rest = evenflow("read", str(book), "--json", "--resume", str(state), "--save", str(state))
        assert rest.returncode == 0, rest.stderr
        again = summaries(rest.stdout)[0]
        assert again["tokens"] == whole["tokens"]
        assert math.isclose(again["nats_per_token"], whole["nats_per_token"], rel_tol=1e-5)

    def test_a_killed_reading_goes_on_from_its_last_saving(self, tmp_path):
        book, state = tmp_path / "book.txt", tmp_path / "state"
        book.write_text(TEXT * 4)
        whole = summaries(evenflow("read", str(book), "--json").stdout)[0]
        reader = subprocess.Popen(
            [sys.executable, "-m", "evenflow", "read", str(book), "--save", str(state), "--save-every", "1",
             "--chunk", "32"],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not state.exists():
            assert time.monotonic() < deadline and reader.poll() is None
            time.sleep(0.005)
        reader.kill()
        reader.wait()
        rest = evenflow("read", str(book), "--json", "--resume", str(state))
        assert rest.returncode == 0, rest.stderr
        again = summaries(rest.stdout)[0]
        assert again["tokens"] == whole["tokens"]
        assert math.isclose(again["nats_per_token"], whole["nats_per_token"], rel_tol=1e-5)

    def test_another_text_is_read_from_its_start_by_a_resumed_session(self, book, tmp_path):
        state, second = tmp_path / "state", tmp_path / "second.txt"
        second.write_text(TEXT[:500])
        alone = summaries(evenflow("read", str(second), "--json").stdout)[0]["tokens"]
        first = summaries(evenflow("read", str(book), "--json", "--save", str(state)).stdout)[0]["tokens"]
        both = evenflow("read", str(second), "--json", "--resume", str(state))
        assert both.returncode == 0 and "read from its start" in both.stderr
        assert summaries(both.stdout)[0]["tokens"] == first + alone
        written = tmp_path / "written"
        assert evenflow("write", "--tokens", "3", "--save", str(written)).returncode == 0
        after = evenflow("read", str(second), "--json", "--resume", str(written))
        assert after.returncode == 0 and summaries(after.stdout)[0]["tokens"] == alone

    def test_what_was_read_before_an_error_is_shown_and_saved(self, tmp_path):
        text, state = tmp_path / "text", tmp_path / "state"
        text.write_bytes(TEXT.encode() + b"\0\n")
        done = evenflow("read", str(text), "--chunk", "64", "--save", str(state))
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith(f"evenflow: {text} is not text")
        assert "Perplexity was" in done.stdout and state.exists()

    @pytest.mark.parametrize("broken", ["evenflow.cli.showing.figure", "evenflow.models.Stream.save"])
    def test_a_full_disk_takes_nothing_with_it_but_its_file(self, book, tmp_path, monkeypatch, broken):
        def full(*_):
            raise OSError(28, "No space left on device", "x")

        monkeypatch.setattr(broken, full)
        figure, state = tmp_path / "curves.png", tmp_path / "state"
        done = evenflow("read", str(book), "--limit", "200", "--figure", str(figure), "--save", str(state))
        assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith("No space left on device")
        assert "Perplexity was" in done.stdout
        figure_failed = broken.endswith("figure")
        assert figure.exists() == ("Figure:" in done.stdout) == (not figure_failed)
        assert state.exists() == ("Saved at token" in done.stdout) == figure_failed

    def test_interrupting_a_followed_log_shows_and_saves(self, book, tmp_path):
        log, state = tmp_path / "app.log", tmp_path / "state"
        log.write_text("".join(TEXT.splitlines(keepends=True)[:40]))
        reader = subprocess.Popen(
            [sys.executable, "-m", "evenflow", "read", "--follow", str(log), "--save", str(state), "--save-every", "50"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        deadline = time.monotonic() + 60
        while not state.exists():
            assert time.monotonic() < deadline and reader.poll() is None
            time.sleep(0.1)
        with log.open("a") as more:
            more.write("One more line, while it is being read.\n")
        time.sleep(1.0)
        reader.send_signal(signal.SIGINT)
        out, error = reader.communicate(timeout=30)
        assert reader.returncode == 0, error
        assert "Saved at token" in out and "Traceback" not in error
        nothing = evenflow("read", str(log), "--resume", str(state))
        assert nothing.returncode == 2 and "nothing new to read" in nothing.stderr

    def test_patience_stops_a_memory_and_says_so(self, book):
        done = evenflow("read", str(book), "--memory", SMALL, "--patience", "0.001")
        assert done.returncode == 0 and re.search(r"stopped at [\d,]+ tokens", done.stdout)


class TestWrite:
    def test_a_seed_writes_the_same_text(self):
        one, two, other = (
            evenflow("write", "--prompt", "The sea", "--tokens", "40", "--seed", seed) for seed in ("5", "5", "6")
        )
        assert one.returncode == 0 and one.stdout.startswith("The sea") and len(one.stdout) > 60
        assert one.stdout == two.stdout != other.stdout
        assert "40 tokens" in one.stderr

    def test_ctrl_c_ends_cleanly_and_saves(self, tmp_path):
        state = tmp_path / "state"
        writer = subprocess.Popen(
            [sys.executable, "-m", "evenflow", "write", "--seed", "1", "--save", str(state)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert writer.stdout is not None
        assert writer.stdout.read(20)
        writer.send_signal(signal.SIGINT)
        _, error = writer.communicate(timeout=60)
        assert writer.returncode == 0 and "Traceback" not in error and "saved" in error
        more = evenflow("write", "--resume", str(state), "--tokens", "5", "--seed", "1")
        assert more.returncode == 0 and "5 tokens" in more.stderr

    def test_a_reader_that_goes_away_ends_it_quietly_and_saved(self, tmp_path):
        state = tmp_path / "state"
        shell = f"{sys.executable} -m evenflow write --seed 1 --save {state} | head -c 20"
        done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=120)
        assert len(done.stdout) == 20 and "Traceback" not in done.stderr and state.exists()


def test_recipes_as_table_and_json():
    table = evenflow("recipes")
    assert all(info.name in table.stdout for info in ef.recipes()) and "arXiv 2309.17453" in table.stdout
    names = [json.loads(line)["name"] for line in evenflow("recipes", "--json").stdout.splitlines()]
    assert "streaming-llm" in names and names == sorted(names)


@pytest.fixture(scope="module")
def bad(tmp_path_factory, book):
    folder = tmp_path_factory.mktemp("bad")
    (folder / "binary").write_bytes(bytes(range(256)))
    (folder / "empty").write_bytes(b"")
    (folder / "state").write_bytes(b"\x10" + b"\0" * 7 + b"not a state file")
    return folder


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["read", "{bad}/none"], "No such file"),
        (["read", "{bad}"], "Is a directory"),
        (["read", "{bad}/binary"], "not text"),
        (["read", "{bad}/empty"], "holds no text"),
        (["read", "-"], "holds no text"),
        (["read", "-", "--follow"], "for files"),
        (["read", "{book}", "--memory", "streaming-lm"], "did you mean 'streaming-llm' or 'streaming-vlm'"),
        (["read", "{book}", "--memory", "window(wndow=3)"], "did you mean 'window'"),
        (["read", "{book}", "--memory", "full", "--memory", "full"], "given twice"),
        (["read", "{book}", "--memory", "full", "--memory", "window", "--save", "x"], "one memory"),
        (["read", "{book}", "--resume", "{bad}/none"], "cannot read"),
        (["read", "{book}", "--resume", "{bad}/state"], "not a saved state"),
        (["read", "{book}", "--save", "{bad}/none/x"], "no folder"),
        (["read", "{book}", "--model", "{bad}/none"], "no model folder"),
        (["read", "{book}", "--model", "{bad}"], "holds no model"),
        (["read", "{book}", "--lmit", "3"], "--limit"),
        (["read", "{book}", "--figure", "x.foo"], ".png"),
        (["read", "{book}", "--save", "{bad}"], "it is a folder"),
        (["read"], "Missing argument"),
        (["write", "--temperature", "-1"], "temperature"),
        (["write", "--tokens", "0"], "tokens"),
        (["rite"], "No such command"),
        (["claims", "run", "nothing"], "nothing"),
    ],
)
def test_bad_input_is_one_line_and_status_2(arguments, message, bad, book):
    done = evenflow(*(argument.format(bad=bad, book=book) for argument in arguments))
    assert done.returncode == 2, done.stderr
    assert message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr


def test_a_state_that_is_damaged_or_of_another_model_is_refused(book, tmp_path):
    state = tmp_path / "state"
    assert evenflow("read", str(book), "--limit", "100", "--memory", SMALL, "--save", str(state)).returncode == 0
    good = state.read_bytes()
    cut, flipped, other = tmp_path / "cut", tmp_path / "flipped", tmp_path / "other"
    cut.write_bytes(good[: len(good) // 2])
    flipped.write_bytes(good[:-9] + bytes([good[-9] ^ 1]) + good[-8:])
    model = AutoModelForCausalLM.from_pretrained(tiny_path())
    with torch.no_grad():
        model.get_input_embeddings().weight[7] += 1  # the same shapes, one row of other weights
    shutil.copytree(tiny_path(), other)
    model.save_pretrained(other)
    for damaged in (cut, flipped):
        done = evenflow("read", str(book), "--resume", str(damaged))
        assert done.returncode == 2 and "its checksum does not match" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    for command in (["read", str(book)], ["write", "--tokens", "3"]):
        done = evenflow(*command, "--model", str(other), "--resume", str(state))
        assert done.returncode == 2 and "was written by another model" in done.stderr
        assert len(done.stderr.splitlines()) == 1
    assert state.read_bytes() == good


def test_a_state_with_notes_of_somebody_elses_is_read_on_from_the_start_of_the_text(book, tmp_path):
    state = tmp_path / "state"
    stream = ef.open("tiny", SMALL)
    stream.consume([1, 2, 3])
    stream.notes = {"offset": 40, "mine": True}
    stream.save(state)
    done = evenflow("read", str(book), "--resume", str(state), "--limit", "50")
    assert done.returncode == 0 and "read from its start" in done.stderr, done.stderr


def test_closed_streams_and_poor_terminals(book):
    command = f"{sys.executable} -m evenflow"
    closed = subprocess.run(["bash", "-c", f"{command} read - <&-"], capture_output=True, text=True, timeout=120)
    assert closed.returncode == 2 and closed.stderr.strip() == (
        "evenflow: standard input is closed; give it a text, or name a file"
    )
    assert process("recipes", PYTHONIOENCODING="ascii").returncode == 0


def test_a_terminal_is_redrawn_and_left_clean(book):
    """In a pseudo-terminal the live table appears, and colours only where they are wanted."""
    import pty

    for environment in ({}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        parent, child = pty.openpty()
        done = subprocess.Popen(
            [sys.executable, "-m", "evenflow", "read", str(book), "--chunk", "64", "--limit", "640", "--memory", SMALL],
            stdout=child, stderr=child, stdin=subprocess.DEVNULL, env={**os.environ, "TERM": "xterm", **environment},
        )  # fmt: skip
        os.close(child)
        output = b""
        while True:
            try:
                piece = os.read(parent, 4096)
            except OSError:
                break
            if not piece:
                break
            output += piece
        os.close(parent)
        assert done.wait(60) == 0
        assert b"Traceback" not in output and b"Perplexity was" in output
        if "NO_COLOR" in environment:
            assert not re.search(rb"\x1b\[(\d+;)*(3[0-7]|38|9[0-7])[;m]", output)
        if "TERM" in environment:
            assert b"\x1b" not in output
