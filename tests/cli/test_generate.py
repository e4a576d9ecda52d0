"""`evenflow generate` with a small random model: files, pipes, reports, and what is refused."""

import contextlib
import io
import json
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from evenflow.cli import main
from evenflow.media import VideoWriter, read_frames, write_image

from ..generate.small import picture, small


@dataclass
class Done:
    """What a run of the command left."""

    returncode: int
    stdout: bytes
    stderr: str


def evenflow(*arguments):
    """The command, in this process."""
    out, error = io.TextIOWrapper(io.BytesIO(), encoding="utf-8"), io.StringIO()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"argv": ["evenflow", *map(str, arguments)], "stdout": out, "stderr": error}.items():
            patch.setattr(sys, name, value)
        with pytest.raises(SystemExit) as leave:
            main()
        out.flush()
    return Done(leave.value.code or 0, out.buffer.getvalue(), error.getvalue())


@pytest.fixture(autouse=True)
def model(monkeypatch):
    monkeypatch.setattr("evenflow.models.video.load_video", lambda *args, **more: small(), raising=False)


def raw(*arguments):
    done = evenflow("generate", "-o", "-", *arguments)
    assert done.returncode == 0, done.stderr
    return np.frombuffer(done.stdout, np.uint8).reshape(-1, 16, 16, 3)


def test_a_video_of_so_many_seconds(tmp_path):
    place = tmp_path / "a.mp4"
    done = evenflow("generate", "--prompt", "a red ball", "--seconds", 2, "-o", place)
    assert done.returncode == 0 and "32 frames, 2.0 s of video" in done.stderr and str(place) in done.stderr
    frames = np.stack(list(read_frames(place)))
    assert frames.shape == (32, 16, 16, 3)
    assert np.abs(frames.astype(int) - raw("--prompt", "a red ball", "--seconds", 2)).mean() < 40


def test_a_switch_a_track_and_a_seed_show_from_then_on():
    plain = raw("--prompt", "a red ball", "--seconds", 3)
    assert len(plain) == 48 and np.array_equal(plain, raw("--prompt", "a red ball", "--seconds", 3))
    switched = raw("--prompt", "a red ball", "--seconds", 3, "--switch", "1:a blue cube", "--how", "clear")
    assert np.array_equal(plain[:21], switched[:21]) and not np.array_equal(plain[33:], switched[33:])
    drawn = raw("--prompt", "a red ball", "--seconds", 3, "--track", "3,3@2;12,12@2.6")
    assert np.array_equal(plain[:21], drawn[:21]) and not np.array_equal(plain, drawn)
    assert not np.array_equal(plain, raw("--prompt", "a red ball", "--seconds", 3, "--seed", 1))


@pytest.mark.parametrize("options", [
    ("--schedule", "rolling"), ("--schedule", "buffer(0, 4, 2, 1)"), ("--schedule", "batch"), ("--memory", "motionstream"),
    ("--schedule", "buffer(0,2,2,1)", "--memory", "none"),
])  # fmt: skip
def test_other_schedules_and_memories(options):
    assert len(raw("--seconds", 1, *options)) == 16


def test_pictures_and_videos_to_begin_with(tmp_path):
    write_image(tmp_path / "a.png", picture(1))
    with VideoWriter(tmp_path / "in.mp4", 16, 0) as writer:
        writer.write(picture(2, 40))
    plain = raw("--seconds", 1)
    assert not np.array_equal(plain, raw("--seconds", 1, "--image", tmp_path / "a.png"))
    assert not np.array_equal(plain, raw("--seconds", 1, "--video", tmp_path / "in.mp4"))
    anew = raw("--video", tmp_path / "in.mp4", "--strength", 0.5)
    assert len(anew) == 33  # 9 frames and two chunks of 12: the video ends before another is complete


def test_a_saved_stream_goes_on(tmp_path):
    whole = raw("--prompt", "a red ball", "--seconds", 45 / 16)
    first = raw("--prompt", "a red ball", "--seconds", 21 / 16, "--save", tmp_path / "s.evenflow")
    rest = raw("--resume", tmp_path / "s.evenflow", "--seconds", 24 / 16)
    assert np.array_equal(np.concatenate([first, rest]), whole)


def test_a_report_draws_what_drifts(tmp_path):
    place = tmp_path / "report"
    raw("--seconds", 3, "--report", place, "--switch", "1:a blue cube")
    told = json.loads((place / "drift.json").read_text())
    assert {len(curve) for curve in told["seconds"].values()} == {3}
    assert [entry["prompt"] for entry in told["switches"]] == ["", "a blue cube"]
    assert told["judge"] is None or set(told["judge"]) <= {"drift", "obeys"}
    assert (place / "drift.png").read_bytes()[:4] == b"\x89PNG"


def test_the_judge_of_the_world_sees_what_a_report_can_tell():
    from evenflow.cli.drift import Drift

    drift, frames = Drift(16), np.full((40, 64, 64, 3), 90, dtype=np.uint8)
    drift.add(frames[:20], "a red ball on a meadow")
    frames[20:, 20:40, 20:40] = (220, 30, 30)
    drift.add(frames[20:], "a red square on a meadow")
    judged = drift.told()["judge"]
    assert judged["drift"].keys() >= {"identity", "colour", "backdrop"}
    assert [entry["seconds"] for entry in judged["obeys"]] == [0.0, 1.25]


def test_the_help_teaches():
    done = evenflow("generate", "--help")
    for word in (b"--prompt", b"--switch", b"--track", b"--schedule", b"ffplay", b"recache"):
        assert word in done.stdout


@pytest.mark.parametrize(("arguments", "sentence"), [
    (("--schedule", "chonks"), "did you mean 'chunks'"), (("--memory", "streaming-llm"), "memory of frames"),
    (("--switch", "x"), "SECONDS:PROMPT"), (("--track", "1"), "X,Y;X,Y@SECONDS"), (("--size", "big"), "rows x columns"),
    (("-o", "a.avi"), ".mp4"), (("-o", "/no/where/a.mp4"), "no folder"), (("--strength", "0.5"), "name one"),
    (("--image", "nowhere.png"), "cannot open nowhere.png"), (("--resume", "nowhere"), "cannot read nowhere"),
    (("--size", "15x16"), "multiple"), (("--how", "foo", "--switch", "1:a"), "one of keep"),
])  # fmt: skip
def test_what_is_wrong_is_told_in_one_line(tmp_path, arguments, sentence):
    with contextlib.chdir(tmp_path):
        done = evenflow("generate", "--seconds", 1, *arguments)
    assert done.returncode == 2 and sentence in done.stderr and done.stderr.count("\n") == 1
    assert done.stderr.startswith("evenflow: ") and list(Path(tmp_path).iterdir()) == []


def test_ctrl_c_ends_it_and_what_was_made_is_kept(tmp_path, monkeypatch):
    from evenflow.generate import VideoStream

    step, place = VideoStream.step, tmp_path / "a.mp4"

    def interrupted(self):
        if self.position >= 9:
            raise KeyboardInterrupt
        return step(self)

    monkeypatch.setattr(VideoStream, "step", interrupted)
    done = evenflow("generate", "-o", place, "--save", tmp_path / "s")
    assert done.returncode == 0 and "33 frames" in done.stderr and sorted(os.listdir(tmp_path)) == ["a.mp4", "s"]
    assert len(list(read_frames(place))) == 33
