"""`evenflow live`: a page on which a video runs and is steered, and a text is read."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..serve import Choice, Source, Texts

EXAMPLES = """Examples:

evenflow live

evenflow live --port 0 --seats 2 --data ~/sessions

evenflow live --host 0.0.0.0 --name studio.example"""

TEXT_MEMORY = "streaming-llm(sink=4, window=252)"
SUGGESTIONS = 9  # as many as there are keys for
SHORT = 48  # characters of one at most


def live(
    host: Annotated[str, typer.Option(help="Where to listen; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 picks a free one.", min=0, max=65535)] = 8484,
    model: Annotated[str, typer.Option("--model", help='A video model: a folder, a hub name, or "tiny".')] = "tiny",
    text_model: Annotated[str, typer.Option(help='What reads texts: a folder, a hub name, or "tiny".')] = "tiny",
    memory: Annotated[
        str, typer.Option("--memory", help="What videos begin with, see `evenflow recipes`.")
    ] = "default",
    schedule: Annotated[str, typer.Option(help="What videos begin with.")] = "chunks",
    data: Annotated[
        Path | None, typer.Option(help="A folder for sessions and recordings.", show_default="in the user's cache")
    ] = None,
    seats: Annotated[int, typer.Option(help="Videos that share the model at once.", min=1, max=256)] = 4,
    keep: Annotated[float, typer.Option(help="Minutes for which a video without a client stays loaded.", min=0)] = 10.0,
    name: Annotated[
        list[str] | None, typer.Option("--name", help="A name under which this server is reached; may be repeated.")
    ] = None,
) -> None:
    """Show a page on which a video runs and can be steered, and texts are read; programs speak to it over a WebSocket."""
    try:
        from ..serve import Limits, Room, Store, Videos, address_of, create_app, default_folder, listen, run
    except ImportError as error:
        raise ValueError(f"serving needs more: pip install 'evenflow[serve]' ({error})") from None
    from ..models.video import load_video

    bound = listen(host, port)  # a port that is taken is told before a model is loaded
    limits = replace(Limits(), seats=seats, keep=keep * 60.0)
    prompts = suggestions()
    source: Source = Videos(load_video(model), prompt=prompts[0], memory=memory, schedule=schedule, suggestions=prompts)
    source.open(prompt=prompts[0], memory=memory, schedule=schedule, seed=0)  # what does not go together is told now
    room = Room(source, Store(data or default_folder(), limits.saved), limits)
    local = host in ("127.0.0.1", "localhost", "::1")
    app = create_app(room, texts(text_model), names=frozenset(name or ()), local=local)

    def ready() -> None:
        print(f"Evenflow live: {address_of(bound)}", flush=True)

    run(app, bound, limits, ready)


def suggestions() -> list[str]:
    """Prompts of what the tiny model was trained on, always the same ones."""
    import numpy as np

    from ..learn.video.clips import VARIETY
    from ..world import describe, draw_scene

    draw, found = np.random.default_rng(4), list[str]()
    while len(found) < SUGGESTIONS:
        text = describe(draw_scene(draw, VARIETY))
        if len(text) <= SHORT and text not in found:
            found.append(text)
    return found


def texts(model: str) -> Texts:
    """What reads texts; the model is loaded when the first text comes."""
    from transformers.utils import logging

    from ..api import memory_for_text
    from ..api import open as open_stream
    from ..models import unfit
    from ..recipes import recipe, recipes
    from ..serve import Choice, Texts

    logging.disable_progress_bar()  # what is loaded for a page needs no bar in the terminal
    loaded: list[Any] = []

    def open_text(memory: str) -> Any:
        chosen = memory_for_text(memory)
        if not loaded:
            stream = open_stream(model, chosen, batch=1)
            if stream.tokenizer is None:
                raise ValueError(f"{model} has no tokenizer, so it cannot read text")
            loaded.extend((stream.model, stream.tokenizer))
            return stream
        return open_stream(loaded[0], chosen, tokenizer=loaded[1], batch=1)

    def memories() -> list[Choice]:
        fit: Callable[[str], str | None] = lambda name: unfit(recipe(name))  # noqa: E731
        return [
            Choice(
                info.name,
                info.summary,
                _plain(info.defaults),
                info.paper,
                {"text": reason} if (reason := fit(info.name)) else {},
            )
            for info in recipes("memory")
        ]

    return Texts(open_text, memories, TEXT_MEMORY)


def _plain(defaults: dict[str, Any]) -> dict[str, Any]:
    """Defaults without what JSON cannot hold."""
    return {k: v for k, v in defaults.items() if not (isinstance(v, float) and not math.isfinite(v))}
