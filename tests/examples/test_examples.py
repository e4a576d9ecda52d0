"""Every example runs as it stands, without arguments, and does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name, folder, *arguments, stdin=""):
    done = subprocess.run(
        [sys.executable, EXAMPLES / name, *arguments], cwd=folder, capture_output=True, text=True, timeout=120,
        input=stdin, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert not list(folder.iterdir()), "an example leaves nothing behind"
    return done.stdout


def test_every_example_is_run_here():
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_endless_chat_stays_flat_and_says_tomorrow_what_it_says_today(tmp_path):
    said = run("endless_chat.py", tmp_path)
    turns = re.findall(r"\[position (\d+), ([\d,]+) bytes held", said)
    assert len(turns) == 13 and len({held for _, held in turns}) == 1
    assert int(turns[9][0]) > 256, "the chat outgrows the memory"
    answers = re.findall(r"^it: (.*)$", said, re.MULTILINE)
    assert answers[-1] == answers[-2] and all(answers)


def test_endless_chat_takes_what_one_types(tmp_path):
    said = run("endless_chat.py", tmp_path, "--ask", "--memory", "window(window=64)", stdin="Who is there?\n\n")
    assert "you: Who is there?" in said and said.count("[position") == 4


def test_watching_finds_the_two_odd_lines(tmp_path):
    first, second = run("watch_a_log.py", tmp_path).splitlines()
    assert "MAYDAY" in first and "I/O error" in second


def test_watching_a_log_of_ones_own(tmp_path):
    log = tmp_path / "own.log"
    log.write_text("The sea was calm, and the lamp burned well.\n" * 30)
    watcher = subprocess.Popen(
        [sys.executable, EXAMPLES / "watch_a_log.py", log, "tiny"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    try:
        with log.open("a") as more:
            more.write("kernel: sdb1: I/O error (-5), sector 0x7f3a\n")
        assert watcher.stdout is not None
        assert "sector 0x7f3a" in watcher.stdout.readline()
    finally:
        watcher.kill()
        watcher.communicate()


def test_own_recipe_is_read_by_its_name_and_keeps_what_a_window_loses(tmp_path):
    rows = run("own_recipe.py", tmp_path).splitlines()
    assert [row.partition("(")[0] for row in rows] == ["window", "streaming-llm", "tova"]
    perplexities = [float(re.search(r"perplexity ([\d.]+)", row)[1]) for row in rows]
    assert len(set(perplexities)) == 3, "what is held changes what is predicted"
    old = [[int(count) for count in row.rpartition(": ")[2].split(", ")] for row in rows]
    assert set(old[0]) == {0} and set(old[1]) == {4} and len(set(old[2])) > 1 and max(old[2]) > 4


def test_the_live_client_steers_a_server(tmp_path):
    from ..serve.double import Double
    from ..serve.running import Running

    (tmp_path / "sessions").mkdir()
    (tmp_path / "here").mkdir()
    with Running(Double(), tmp_path / "sessions") as server:
        said = run("live_client.py", tmp_path / "here", server.address)
    asked = re.findall(r"^after \d+ latent frames: (\w+)$", said, re.MULTILINE)
    assert asked == ["prompt", "track", "blend"]
    assert re.search(r"^1\d\.\d frames/s, last change seen after [\d.]+ s, [\d,]+ bytes held$", said, re.MULTILINE), (
        said
    )
    assert not list((tmp_path / "sessions").iterdir()), "the client forgets its session"


def test_a_film_of_the_world_is_what_was_asked_for(tmp_path):
    said = run("world.py", tmp_path)
    assert said.startswith("96 frames of 64×64, ")
    assert re.search(r"^ *[\d.]+ s  bounce: the \w+ \w+", said, re.MULTILINE), said
    shares = re.findall(r": (\d\.\d\d), (?:not )?obeyed$", said, re.MULTILINE)
    assert len(shares) == 2 and all(float(share) > 0.7 for share in shares)
