"""The `evenflow` command."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .generating import EXAMPLES as GENERATE_EXAMPLES
from .generating import generate
from .living import EXAMPLES as LIVE_EXAMPLES
from .living import live

if TYPE_CHECKING:
    from ..models import Stream
    from .reading import Reading

DEFAULT_MEMORY = "streaming-llm(sink=4, window=252)"
QUIET = 5.0  # seconds between two lines where no terminal can be redrawn

app = typer.Typer(
    name="evenflow",
    help="Run models on endless streams at even cost: flat memory, flat latency, exact positions.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    epilog="Examples:\n\nevenflow read book.txt\n\nevenflow read app.log --follow --surprise 20 --save app.evenflow\n\n"
    "evenflow write --prompt 'The sea'\n\nevenflow generate --prompt 'a red ball rolls' -o ball.mp4 --seconds 20\n\nevenflow live\n\nevenflow recipes\n\nevenflow claims list",
)
claims = typer.Typer(help="Measure what the papers promised.", no_args_is_help=True)
app.add_typer(claims, name="claims")

Model = Annotated[str, typer.Option("--model", help='A model folder, a hub name, or "tiny", the shipped one.')]


@app.command(
    epilog="Examples:\n\nevenflow read book.txt\n\njournalctl -f | evenflow read - --surprise 20\n\n"
    "evenflow read app.log --follow --save app.evenflow\n\n"
    "evenflow read book.txt --memory 'streaming-llm(window=252)' --memory full --patience 60"
)
def read(
    source: Annotated[str, typer.Argument(metavar="FILE|-", help="The text to read; - is standard input.")],
    memory: Annotated[
        list[str] | None,
        typer.Option(
            "--memory",
            help="What to keep, see `evenflow recipes`; repeat to compare.",
            show_default=DEFAULT_MEMORY,
        ),
    ] = None,
    model: Model = "tiny",
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Wait for the file to grow, like tail -F.")] = False,
    surprise: Annotated[int, typer.Option(help="Print the N most surprising lines at the end.", min=0)] = 0,
    save: Annotated[Path | None, typer.Option(help="Save the session here, every so often and at the end.")] = None,
    save_every: Annotated[int, typer.Option(help="Tokens between two savings.", min=1)] = 20_000,
    resume: Annotated[
        Path | None,
        typer.Option(help="Go on with a saved session, and in the same file where it was; another is read whole."),
    ] = None,
    figure: Annotated[
        Path | None,
        typer.Option(
            help="Draw the curves here (PNG, PDF or SVG).", show_default="evenflow-read.png with several memories"
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Stop after the line that reaches so many tokens.", min=1)] = None,
    patience: Annotated[
        float | None, typer.Option(help="Stop a memory that has used so many seconds; the others go on.", min=0)
    ] = None,
    chunk: Annotated[int, typer.Option(help="Tokens read at a time; changes speed, never results.", min=1)] = 512,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of tables.")] = False,
) -> None:
    """Read a text that may never end, and tell how well it was predicted, at what cost, and what was odd in it."""
    from ..media import lines
    from .reading import Reading, Track
    from .showing import figure as draw
    from .showing import final_table, odd_lines, seen, summary

    specs = memory or [DEFAULT_MEMORY]
    if len(specs) > 1 and (save or resume):
        raise ValueError("--save and --resume are for one memory; with several, read them one at a time")
    if resume and memory:
        raise ValueError("--resume goes on with the memory that was saved; leave out --memory")
    if len(set(specs)) < len(specs):
        raise ValueError("the same --memory was given twice")
    drawn = figure or (Path("evenflow-read.png") if len(specs) > 1 else None)
    for path in (save, drawn):
        _check_writable(path)
    if drawn and drawn.suffix.lower() not in (".png", ".pdf", ".svg"):
        raise ValueError(f"cannot draw {drawn}: its name has to end in .png, .pdf or .svg")
    source_lines = lines(source, follow)
    first = next(source_lines, None) if source != "-" else None  # a missing file is told before a model is loaded
    streams = _streams(model, specs, resume)
    reading = Reading([Track(s.memory.spec, s) for s in streams], _encoder(streams[0]), chunk, surprise)
    place = "-" if source == "-" else str(Path(source).resolve())
    if resume:
        notes = streams[0].notes
        if notes.keys() >= reading.notes().keys():
            reading.recall(notes, same=notes.get("source") == place)
        if reading.offset:
            source_lines.close()
            source_lines, first = lines(source, follow, reading.offset, reading.number), None
        elif source != "-":
            print(f"{resume} was not saved while reading {source}: it is read from its start", file=sys.stderr)
    else:
        for stream in streams:
            begin = getattr(stream.tokenizer, "bos_token_id", None)
            if begin is not None:
                stream.consume([begin])
    console = _console(as_json)

    def everything() -> Iterator[Any]:
        if first is not None:
            yield first
        yield from source_lines

    def keep() -> None:
        if save is not None:
            streams[0].notes = {**reading.notes(), "source": place}
            streams[0].save(save)

    view = _json_view(reading) if as_json else _view(reading, console)
    start = saved = reading.tokens
    trouble: Exception | None = None
    try:
        with view as show, contextlib.suppress(KeyboardInterrupt):
            for _ in reading.run(everything(), limit, patience):
                show()
                if save is not None and reading.tokens - saved >= save_every:
                    saved = reading.tokens
                    keep()
    except (ValueError, OSError) as error:
        if reading.tokens == start:
            raise
        trouble = error  # what was read until then is still shown and saved
    for track in reading.tracks:
        track.finish()
    if reading.tokens == start:
        what = "nothing new to read" if resume else "no text; there is nothing to read"
        raise ValueError(f"{'standard input' if source == '-' else source} holds {what}")

    def attempt(make: Callable[[], None], sentence: str) -> list[str]:
        """What can be said when it is made; a full disk must not take the figures of the reading with it."""
        nonlocal trouble
        try:
            make()
        except (ValueError, OSError) as error:
            trouble = trouble or error
            return []
        return [sentence]

    kept = attempt(keep, f"Saved at token {reading.tokens:,}: go on with --resume {save}") if save else []
    pictured = attempt(lambda: draw(reading, drawn), f"Figure: {drawn}") if drawn else []
    if as_json:
        for odd in sorted(reading.odd, reverse=True):
            _say_json({"kind": "surprise", **vars(odd)})
        for track in reading.tracks:
            _say_json({"kind": "summary", **summary(track)})
    else:
        out = _stdout()
        if surprise:
            out.print(odd_lines(reading.odd, reading.tracks[0].name))
        out.print(final_table(reading.tracks))
        for sentence in [*pictured, *seen(reading.tracks), *kept]:
            out.print(sentence, soft_wrap=True, highlight=False, markup=False)
    if trouble is not None:
        raise trouble


@app.command(
    epilog="Examples:\n\nevenflow write --prompt 'The sea'\n\nevenflow write --tokens 200 --seed 7 > story.txt"
)
def write(
    prompt: Annotated[str, typer.Option(help="What the text begins with.")] = "",
    memory: Annotated[str, typer.Option("--memory", help="What to keep, see `evenflow recipes`.")] = DEFAULT_MEMORY,
    model: Model = "tiny",
    tokens: Annotated[int | None, typer.Option(help="Stop after so many tokens; otherwise ctrl-C does.", min=1)] = None,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.", min=0)] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from the most likely tokens of this mass.", min=0, max=1)] = 0.95,
    top_k: Annotated[int | None, typer.Option(help="Sample from the K most likely tokens.", min=1)] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed writes the same text.")] = None,
    save: Annotated[Path | None, typer.Option(help="Save the session here at the end (also after ctrl-C).")] = None,
    resume: Annotated[Path | None, typer.Option(help="Go on with a saved session.")] = None,
) -> None:
    """Write for ever, at the same cost for every token, until stopped."""
    from .reading import whole
    from .showing import amount
    from .writing import Speller

    _check_writable(save)
    stream = _streams(model, [memory], resume)[0]
    if stream.tokenizer is None:
        raise ValueError(f"{model} has no tokenizer, so there is no text to write")
    if stream.position == 0:
        start = getattr(stream.tokenizer, "bos_token_id", None)
        if start is not None:
            stream.consume([start])
    fed = stream.tokenizer.encode(prompt, add_special_tokens=False) if prompt else None
    if fed is None and stream.position == 0:
        raise ValueError("this model has no start-of-text token; give a --prompt")
    speller, count, began = Speller(stream.tokenizer), 0, time.perf_counter()
    writing = stream.generate(fed, tokens, temperature, top_p, seed, top_k=top_k)
    try:
        sys.stdout.write(prompt)
        sys.stdout.flush()
        with contextlib.suppress(KeyboardInterrupt):
            while True:
                with whole():
                    token = next(writing, None)
                    if token is None:
                        break
                    sys.stdout.write(speller.add(token))
                    sys.stdout.flush()
                    count += 1
        sys.stdout.write(speller.rest() + "\n")
        sys.stdout.flush()
    finally:
        if save is not None:
            stream.save(save)
    rate = count / max(1e-9, time.perf_counter() - began)
    held = amount(stream.nbytes)
    print(f"{count:,} tokens, {rate:,.0f}/s, {held} held, position {stream.position:,}", file=sys.stderr)
    if save is not None:
        print(f"saved: go on with --resume {save}", file=sys.stderr)


@app.command(
    epilog="Examples:\n\nevenflow recipes\n\nevenflow recipes longlive\n\nevenflow recipes 'longlive(window=9)'"
)
def recipes(
    name: Annotated[
        str | None, typer.Argument(metavar="[RECIPE]", help="One of them in full, with or without parameters.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON lines instead of a table.")] = False,
) -> None:
    """List the memory methods: what each keeps, its parameters, and the paper it comes from. Or show one in full."""
    from rich.table import Table

    from ..recipes import composed
    from ..recipes import recipes as every
    from ..recipes.registry import documentation

    infos = every()
    if name is not None:
        memory = composed(name)
        infos = [info for info in infos if info.name == memory.name]
        if not as_json:
            from ..claims.registry import FOLDER
            from .describing import described

            out = _stdout()
            out.print(described(memory, infos[0], documentation(memory.name), FOLDER, out.width))
            return
    if as_json:
        for info in infos:
            _say_json(vars(info))
        return
    table = Table(caption="One in full, with its parameters: evenflow recipes NAME", caption_justify="left")
    table.add_column("recipe", no_wrap=True)
    table.add_column("what it keeps", overflow="fold")
    table.add_column("kind", no_wrap=True)
    table.add_column("paper", no_wrap=True)
    for info in infos:
        table.add_row(
            info.name, info.summary, info.kind, "arXiv " + info.paper.rpartition("arXiv ")[2].partition(",")[0]
        )
    _stdout().print(table)


app.command(epilog=GENERATE_EXAMPLES)(generate)
app.command(epilog=LIVE_EXAMPLES)(live)


@claims.command("list")
def claims_list() -> None:
    """Name every claim that can be measured."""
    from ..claims import describe, names

    for name in names():
        print(f"{name:24} {describe(name)}")


@claims.command("run")
def claims_run(
    name: Annotated[str, typer.Argument(help="See `evenflow claims list`.")],
    full: Annotated[bool, typer.Option("--full", help="At full length: minutes to hours instead of minutes.")] = False,
) -> None:
    """Measure one claim here and now: paper | ours | holds?"""
    from ..claims import run, table

    _quiet_transformers()
    result = run(name, full=full, progress=lambda text: print(f"… {text}", file=sys.stderr))
    _stdout().print(table(result))


@claims.command(
    "compare", epilog="Examples:\n\nevenflow claims compare\n\nevenflow claims compare window streaming-llm"
)
def claims_compare(
    names: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE]...", help="Only these, and write nothing.")
    ] = None,
    into: Annotated[
        Path | None, typer.Option(help="A folder for the page and its figure.", show_default="runs/claims")
    ] = None,
) -> None:
    """Read one stream with every memory at the same budget: what each still knows, its error, and what it costs.

    Recipes of other kinds (lanes, linked, mixed, features, doors) have tables of their own."""
    from ..claims import compared, kinds
    from ..claims.compare import compare
    from ..claims.registry import FOLDER
    from ..recipes import recipe

    def say(text: str) -> None:
        print(f"… {text}", file=sys.stderr)

    plain = [name for name in names or () if recipe(name).kind == "memory"]
    others = [name for name in names or () if name not in plain]
    sections = kinds.sections(others, say) if others or not names else []
    result = compare(plain, say=say) if plain or not names else None
    if result is not None:
        _stdout().print(compared.table(result))
    for section in sections:
        _stdout().print(compared.kind_table(section))
    if result is not None and not names:
        result.save(FOLDER)
        for folder in {FOLDER, into or FOLDER}:
            print(f"Page: {compared.publish(result, folder, 'evenflow claims compare', sections)}")


@claims.command("report")
def claims_report() -> None:
    """Draw all results that were measured here: one table, one figure."""
    from ..claims import report

    print(report())


# -- what the commands share -------------------------------------------------------------------------------------------


def _streams(model: str, specs: list[str], resume: Path | None) -> list[Stream]:
    """One stream for each spec, over one loading of the model."""
    from ..api import memory_for_text
    from ..api import open as open_stream
    from ..api import resume as resume_stream

    memories = [memory_for_text(spec) for spec in specs]  # what is wrong with one is told before a model is loaded
    _quiet_transformers()
    if resume is not None:
        return [resume_stream(model, resume)]
    first = open_stream(model, memories[0], batch=1)
    others = [open_stream(first.model, memory, tokenizer=first.tokenizer, batch=1) for memory in memories[1:]]
    return [first, *others]


def _check_writable(path: Path | None) -> None:
    """Told before hours of work, not after them."""
    if path is not None and not path.resolve().parent.is_dir():
        raise ValueError(f"cannot write {path}: there is no folder {path.resolve().parent}")
    if path is not None and path.is_dir():
        raise ValueError(f"cannot write {path}: it is a folder; name a file in it")


def _quiet_transformers() -> None:
    """Its progress bars and notices would stand between our lines."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _encoder(stream: Stream) -> Any:
    if stream.tokenizer is None:
        raise ValueError("this model has no tokenizer, so it cannot read text")
    return lambda text: stream.tokenizer.encode(text, add_special_tokens=False)


def _stdout() -> Any:
    from rich.console import Console

    # A pipe has no width; wide enough that a table's row stays one line.
    return Console(width=None if sys.stdout.isatty() else 160)


def _console(quiet: bool) -> Any:
    from rich.console import Console

    return Console(stderr=True, quiet=quiet)


Now = tuple[int, float, int, float]


@contextlib.contextmanager
def _view(reading: Reading, console: Any) -> Iterator[Any]:
    """Shows the reading on standard error: redrawn in a terminal, a line every few seconds elsewhere."""
    from rich.live import Live

    from .showing import line_now, live_table

    marks: list[Now] = [_now(track) for track in reading.tracks]
    shown = time.monotonic()
    redraws = console.is_terminal and not console.is_dumb_terminal
    with Live(console=console, auto_refresh=False, transient=True) if redraws else contextlib.nullcontext() as live:

        def show() -> None:
            nonlocal marks, shown
            if time.monotonic() - shown < (0.5 if redraws else QUIET):
                return
            if live is not None:
                live.update(live_table(reading.tracks, marks), refresh=True)
            else:
                for track, mark in zip(reading.tracks, marks, strict=True):
                    if track.stopped is None:
                        print(line_now(track, mark), file=sys.stderr)
            marks, shown = [_now(track) for track in reading.tracks], time.monotonic()

        yield show


@contextlib.contextmanager
def _json_view(reading: Reading) -> Iterator[Any]:
    """One JSON line a memory for every thousand tokens or so."""
    marks: list[Now] = [_now(track) for track in reading.tracks]

    def show() -> None:
        for place, (track, mark) in enumerate(zip(reading.tracks, marks, strict=True)):
            if track.tokens - mark[0] < 1024:
                continue
            now = (track.nats - mark[1]) / (track.counted - mark[2]) if track.counted > mark[2] else math.nan
            seconds = track.seconds - mark[3]
            _say_json(
                {
                    "kind": "progress", "memory": track.name, "tokens": track.tokens, "nats_per_token_now": now,
                    "nats_per_token": track.nats_per_token, "bytes": track.stream.nbytes,
                    "tokens_per_second": (track.tokens - mark[0]) / seconds if seconds else math.nan,
                }
            )  # fmt: skip
            marks[place] = _now(track)

    yield show


def _now(track: Any) -> Now:
    return track.tokens, track.nats, track.counted, track.seconds


def _say_json(values: dict[str, Any]) -> None:
    clean = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
    print(json.dumps(clean, ensure_ascii=False), flush=True)


def main() -> None:
    """The command: what a user can put right is one line on standard error and exit status 2."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal without a character shows a question mark for it
    try:
        status = app(standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        # Whoever read our output has gone; nothing more can be said, and Python must not try to at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except KeyboardInterrupt:
        sys.exit(130)
    except typer.Exit as leave:
        sys.exit(leave.exit_code)
    except typer.Abort:
        sys.exit(130)
    except (ValueError, TypeError, OSError) as error:
        _fail(_sentence(error))
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        _fail(f"{error.format_message()} (see --help)")
    sys.exit(status if isinstance(status, int) else 0)


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"cannot open {error.filename}: {error.strerror}"
    return " ".join(str(error).split())


def _fail(message: str) -> None:
    print(f"evenflow: {message}", file=sys.stderr)
    sys.exit(2)
