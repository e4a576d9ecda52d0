"""`evenflow generate`: an endless video into a file, a pipe, and figures of how it drifts."""

from __future__ import annotations

import contextlib
import itertools
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from ..generate import VideoStream

QUIET = 5.0  # seconds between two lines where no terminal can be redrawn
EXAMPLES = """Examples:

evenflow generate --prompt 'a red ball rolls' --seconds 20 -o ball.mp4

evenflow generate --prompt 'a red ball' --switch '10:a blue cube' --switch '20:two cubes' --over 1 --seconds 30 -o a.mp4

evenflow generate --image start.png --track '10,40;50,20@3' -o drag.mp4 --seconds 5

evenflow generate --video in.mp4 --strength 0.6 --prompt 'at night' -o night.mp4

evenflow generate -o - | ffplay -f rawvideo -pixel_format rgb24 -video_size 64x64 -framerate 16 -"""


def generate(
    prompt: Annotated[str, typer.Option(help="What is to be seen.")] = "",
    seconds: Annotated[
        float | None, typer.Option(help="Length of the video; without, until ctrl-C.", min=0.01, show_default="endless")
    ] = None,
    output: Annotated[
        str, typer.Option("--output", "-o", help="An MP4 file, or - for raw rgb24 frames on standard output.")
    ] = "evenflow.mp4",
    switch: Annotated[
        list[str] | None,
        typer.Option("--switch", help='"SECONDS:PROMPT": another prompt from there on; may be repeated.'),
    ] = None,
    how: Annotated[
        str | None,
        typer.Option(
            help="What a switch does to the memory: keep, clear, recache or anchored.", show_default="the memory's best"
        ),
    ] = None,
    over: Annotated[float, typer.Option(help="Seconds that a switch takes, texts mixed meanwhile.", min=0)] = 0.0,
    track: Annotated[
        list[str] | None,
        typer.Option(
            "--track",
            help='"X,Y;X,Y@SECONDS;…": a point that is dragged, in pixels; without @ a point comes a second after the '
            "one before. May be repeated.",
        ),
    ] = None,
    image: Annotated[Path | None, typer.Option(help="Begin with this picture.")] = None,
    video: Annotated[
        Path | None, typer.Option(help="Go on from this video, or with --strength make it anew in another style.")
    ] = None,
    strength: Annotated[
        float | None, typer.Option(help="How much of --video is made anew, above 0 to 1 (nothing of it stays).")
    ] = None,
    memory: Annotated[
        str, typer.Option("--memory", help="What to keep, see `evenflow recipes`; none keeps nothing.")
    ] = "default",
    schedule: Annotated[
        str, typer.Option(help="chunks, rolling(levels=5), buffer(0, 8, 2, 1), rain, batch or knots.")
    ] = "chunks",
    size: Annotated[str | None, typer.Option(help="Rows x columns, as 480x832.", show_default="the model's")] = None,
    seed: Annotated[int, typer.Option(help="The same seed makes the same video.")] = 0,
    model: Annotated[str, typer.Option("--model", help='A model folder, or "tiny", the shipped one.')] = "tiny",
    device: Annotated[str, typer.Option(help="Where the model runs: cpu, cuda, mps.")] = "cpu",
    dtype: Annotated[
        str | None, typer.Option(help="Of the model's weights, as bfloat16.", show_default="as they are stored")
    ] = None,
    save: Annotated[Path | None, typer.Option(help="Save the stream here at the end (also after ctrl-C).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a saved stream.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="A folder for drift.png and drift.json: how the pictures change with time.")
    ] = None,
) -> None:
    """Generate video for ever, at the same cost for every chunk; steer it by prompts, tracks, pictures and videos."""
    from ..media import RawWriter, VideoWriter
    from .drift import Drift

    switches = [_switch(text) for text in switch or []]
    tracks = [_track(text) for text in track or []]
    if strength is not None and video is None:
        raise ValueError("--strength is for making a --video anew; name one")
    if image is not None and video is not None:
        raise ValueError("--image and --video both say how to begin; give one")
    if resume is not None and (image is not None or video is not None):
        raise ValueError("--resume goes on with a saved stream, which has begun already; leave out --image and --video")
    for path in (None if output == "-" else Path(output), save):
        _check_place(path)
    if output != "-" and Path(output).suffix.lower() != ".mp4":
        raise ValueError(f"cannot write {output}: its name has to end in .mp4, or be - for raw frames")
    stream = _open(model, resume, prompt, memory, schedule, seed, size, strength, dtype, device)
    fps = stream.model.config.fps
    for at, text in switches:
        stream.ask(text, how, over, at=_latent(stream, at))
    for points in tracks:
        stream.draw(points)
    source = _begin(stream, image, video)
    most = None if seconds is None else max(1, round(seconds * fps))
    drift = Drift(fps) if report is not None else None
    writer = RawWriter() if output == "-" else VideoWriter(output, fps)
    began = time.perf_counter()
    with writer, _progress(stream, most) as shown, contextlib.suppress(KeyboardInterrupt):
        for frames, said in _chunks(stream, source, most):
            writer.write(frames)
            if drift is not None:
                drift.add(frames, said)
            shown(writer.written)
    took = time.perf_counter() - began
    if save is not None:
        stream.save(save)
    rate = writer.written / max(took, 1e-9)
    place = "" if output == "-" else f" → {output}"
    print(
        f"{writer.written:,} frames, {writer.written / fps:.1f} s of video in {took:.1f} s ({rate:.1f}/s), "
        f"{stream.nbytes / 1e6:.1f} MB held{place}",
        file=sys.stderr,
    )
    if drift is not None and report is not None:
        for path in drift.write(report):
            print(f"report: {path}", file=sys.stderr)
    if save is not None:
        print(f"saved: go on with --resume {save}", file=sys.stderr)


def _open(
    model: str, resume: Path | None, prompt: str, memory: str, schedule: str, seed: int, size: str | None,
    strength: float | None, dtype: str | None, device: str,
) -> VideoStream:  # fmt: skip
    from ..api import resume_video
    from ..api import video as open_video

    if resume is not None:
        stream = resume_video(model, resume, dtype=dtype, device=device)
        if prompt:
            stream.ask(prompt)
        return stream
    kept = None if memory.lower() == "none" else memory
    return open_video(
        model, prompt, memory=kept, schedule=schedule, seed=seed, size=_size(size), strength=strength, dtype=dtype,
        device=device,
    )  # fmt: skip


def _begin(stream: VideoStream, image: Path | None, video: Path | None) -> Iterator[np.ndarray] | None:
    """Show the picture, or watch the video; the frames still to be watched where it is made anew."""
    import numpy as np

    from ..media import read_frames, read_image

    if image is not None:
        stream.show(read_image(image, stream.size))
    if video is None:
        return None
    frames = read_frames(video, stream.size, stream.model.config.fps)
    if stream.strength is not None:
        return frames
    stride = stream.model.config.stride[0]
    piece = list(itertools.islice(frames, 1))
    if not piece:
        raise ValueError(f"{video} holds no pictures")
    while len(piece) in (1, 4 * stride):
        stream.watch(np.stack(piece))
        piece = list(itertools.islice(frames, 4 * stride))
    if len(piece) >= stride:
        stream.watch(np.stack(piece[: len(piece) // stride * stride]))
    return None


def _chunks(
    stream: VideoStream, source: Iterator[np.ndarray] | None, most: int | None
) -> Iterator[tuple[np.ndarray, str]]:
    """Frames and what they were made for, up to `most` frames, or to the end of the video that is made anew."""
    import numpy as np

    left = most
    while left is None or left > 0:
        if source is not None and stream.wants:
            piece = list(itertools.islice(source, stream.wants))
            if piece:
                stream.watch(np.stack(piece))
            if stream.wants:
                return
        chunk = stream.step()
        frames = chunk.frames if left is None else chunk.frames[:left]
        left = None if left is None else left - len(frames)
        yield frames, chunk.prompt


@contextlib.contextmanager
def _progress(stream: VideoStream, most: int | None) -> Iterator[Any]:
    """Shows how far it is on standard error: a bar in a terminal, a line every few seconds elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    if not console.is_terminal:
        began = last = time.monotonic()

        def line(written: int) -> None:
            nonlocal last
            if time.monotonic() - last >= QUIET:
                last = time.monotonic()
                rate = written / (last - began)
                print(f"{written:,} frames, {rate:.1f}/s, {stream.prompt}", file=sys.stderr)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("frames", total=most)
        yield lambda written: bar.update(task, completed=written, description=stream.prompt[:40] or "frames")


def _switch(text: str) -> tuple[float, str]:
    at, colon, prompt = text.partition(":")
    try:
        seconds = float(at)
    except ValueError:
        seconds = -1.0
    if not colon or not seconds >= 0 or not prompt.strip():
        raise ValueError(f"--switch is {text!r}; write SECONDS:PROMPT, as '10:a blue cube'")
    return seconds, prompt.strip()


def _latent(stream: VideoStream, seconds: float) -> int:
    """The latent frame that is shown at a time."""
    config = stream.model.config
    return max(stream.position, -(-round(seconds * config.fps) // config.stride[0]))


def _track(text: str) -> list[tuple[float, float, float]]:
    points, at = list[tuple[float, float, float]](), -1.0
    try:
        for part in text.split(";"):
            place, timed, when = part.partition("@")
            x, y = (float(number) for number in place.split(","))
            at = float(when) if timed else at + 1.0
            points.append((at, x, y))
    except ValueError:
        raise ValueError(f"--track is {text!r}; write points as 'X,Y;X,Y@SECONDS'") from None
    return points


def _size(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    rows, cross, columns = text.lower().partition("x")
    if not cross or not rows.isdigit() or not columns.isdigit():
        raise ValueError(f"--size is {text!r}; write rows x columns, as 480x832")
    return int(rows), int(columns)


def _check_place(path: Path | None) -> None:
    """Told before hours of work, not after them."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.resolve().parent}")
    if path is not None and path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")
