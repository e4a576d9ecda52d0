"""Video files in and out, through real codecs."""

import io
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from evenflow.media import NotVideo, RawWriter, VideoWriter, read_frames, read_image, write_image


def film(count, size=(48, 64)):
    """A bright square that goes right, one pixel a frame."""
    frames = np.full((count, *size, 3), 40, dtype=np.uint8)
    for n, frame in enumerate(frames):
        frame[10:30, n % 40 : n % 40 + 20] = 200
    return frames


@pytest.mark.parametrize("quality", [0, 18])
def test_what_is_written_is_read(tmp_path, quality):
    path, frames = tmp_path / "a.mp4", film(30)
    with VideoWriter(path, 16, quality) as writer:
        writer.write(frames[:7])
        writer.write(frames[7])
        writer.write(frames[8:])
    assert writer.written == 30 and list(tmp_path.iterdir()) == [path]
    again = np.stack(list(read_frames(path)))
    assert again.shape == frames.shape
    assert np.abs(again.astype(int) - frames).mean() < (1.5 if quality == 0 else 4)


@pytest.mark.parametrize(("fps", "count"), [(16, 32), (8, 16), (32, 64), (None, 32), (24, 48)])
def test_other_rates_repeat_or_leave_out_by_time(tmp_path, fps, count):
    path, frames = tmp_path / "a.mp4", film(32)
    with VideoWriter(path, 16, 0) as writer:
        writer.write(frames)
    again = list(read_frames(path, fps=fps))
    assert len(again) == count
    for n in range(0, count, 5):
        nearest = frames[int(n * 16 / (fps or 16) + 1e-6)].astype(int)
        assert np.abs(again[n] - nearest).mean() < 1.5
    assert len(list(read_frames(path, fps=fps, limit=5))) == 5


def test_other_sizes_are_cut_in_the_middle(tmp_path):
    path, frames = tmp_path / "a.mp4", np.zeros((3, 40, 80, 3), dtype=np.uint8)
    frames[:, :, 20:60] = 220  # the middle square
    with VideoWriter(path, 16, 0) as writer:
        writer.write(frames)
    for size in ((20, 20), (60, 60), (40, 40)):
        (first, *_) = read_frames(path, size)
        assert first.shape == (*size, 3) and first[2:-2, 3:-3].min() > 190


def test_pictures(tmp_path):
    image = film(1)[0]
    write_image(tmp_path / "a.png", image)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    assert read_image(tmp_path / "a.png", (16, 16)).shape == (16, 16, 3)


def test_raw_frames():
    pipe = io.BytesIO()
    with RawWriter(pipe) as writer:
        writer.write(film(3))
        writer.write(film(1)[0])
    assert writer.written == 4 and pipe.getvalue() == film(3).tobytes() + film(1).tobytes()


def test_what_is_no_video_is_refused(tmp_path):
    (tmp_path / "a.mp4").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(NotVideo, match="no video that can be read"):
        list(read_frames(tmp_path / "a.mp4"))
    with pytest.raises(FileNotFoundError):
        list(read_frames(tmp_path / "b.mp4"))
    with pytest.raises(IsADirectoryError):
        list(read_frames(tmp_path))
    with pytest.raises(FileNotFoundError):
        VideoWriter(tmp_path / "no" / "a.mp4", 16)
    with VideoWriter(tmp_path / "c.mp4", 16) as writer:
        with pytest.raises(ValueError, match="even"):
            writer.write(np.zeros((1, 5, 4, 3), dtype=np.uint8))
        with pytest.raises(ValueError, match="uint8"):
            writer.write(np.zeros((1, 4, 4, 3)))
        writer.write(np.zeros((1, 16, 16, 3), dtype=np.uint8))
        with pytest.raises(ValueError, match="32×32 pixels in a video of 16×16"):
            writer.write(np.zeros((1, 32, 32, 3), dtype=np.uint8))
    assert len(list(read_frames(tmp_path / "c.mp4"))) == 1


def test_without_a_frame_there_is_no_file(tmp_path):
    with VideoWriter(tmp_path / "a.mp4", 16):
        pass
    assert list(tmp_path.iterdir()) == []


WRITES = """
import sys, time, numpy as np
from evenflow.media import VideoWriter
with VideoWriter(sys.argv[1], 16) as writer:
    for n in range(10_000):
        writer.write(np.random.default_rng(n).integers(0, 255, (8, 64, 64, 3), dtype=np.uint8))
        print(n, flush=True)
"""


@pytest.mark.parametrize(("kill", "name"), [(signal.SIGINT, "a.mp4"), (signal.SIGKILL, "a.mp4.part")])
def test_an_interrupted_video_can_be_played(tmp_path, kill, name):
    """Closed by ctrl-C it has its name; killed, what was written lies beside it and can be played all the same."""
    started = subprocess.Popen(
        [sys.executable, "-c", WRITES, tmp_path / "a.mp4"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    for line in started.stdout:
        if int(line) == 30:
            os.kill(started.pid, kill)
            break
    started.communicate()
    assert [path.name for path in tmp_path.iterdir()] == [name]
    count = len(list(read_frames(tmp_path / name)))
    assert count >= (248 if kill == signal.SIGINT else 32)
