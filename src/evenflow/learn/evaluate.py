"""How well a model predicts a folder of text: `python -m evenflow.learn.evaluate MODEL --data FOLDER`.

The dense model reads samples of the trained length behind a sink token, each from nothing; the figures are what a
memory is to be compared with. With `--memory SPEC` it reads through that memory instead.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from ..memory import Memory
from ..models import open_stream
from ..recipes import parse
from .corpus import text_files
from .pretrain import sink_share


@dataclass(frozen=True)
class Evaluation:
    """What was measured: sizes in tokens and in bytes of UTF-8 text, losses in nats, attention as a share."""

    samples: int
    context: int
    tokens: int
    bytes: int
    nats_per_token: float
    nats_per_byte: float
    perplexity: float
    sink_share: list[float]


def spread(files: list[Path], tokenizer: PreTrainedTokenizerFast, context: int, count: int) -> tuple[Tensor, int]:
    """At most `count` samples int64 [n, context] behind the sink token, spread evenly over the files, and their bytes.

    Raises ValueError when the tokenizer has no sink (bos) token or the files hold less than one sample.
    """
    sink = tokenizer.bos_token_id
    if sink is None:
        raise ValueError("the tokenizer has no bos token to put in front of every sample")
    ids: list[int] = []
    for path in files:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        for encoded in tokenizer(lines, add_special_tokens=False)["input_ids"]:
            ids += encoded
    length = context - 1
    whole = len(ids) // length
    if not whole:
        raise ValueError(
            f"the text has {len(ids)} tokens; one sample needs {length}: give more text, or a lower --context"
        )
    body = torch.tensor(ids[: whole * length]).reshape(whole, length)
    number = min(whole, count)
    body = body[torch.arange(number) * whole // number]
    # A token may hold a part of a character, which no decoder gives back; so bytes are counted in the byte-level
    # symbols of the tokens, where every symbol is one byte.
    size = sum(map(len, tokenizer.convert_ids_to_tokens(body.flatten().tolist())))
    return torch.cat([torch.full((len(body), 1), sink), body], 1), size


@torch.no_grad()
def evaluate(
    model: LlamaForCausalLM,
    samples: Tensor,
    size: int,
    memory: Memory | None = None,
    batch: int = 8,
    show: bool = False,
) -> Evaluation:
    """Measure over samples int64 [n, context], which hold `size` bytes of text. The sink token is not predicted.

    memory: what each sample is read through, None for the dense model. The sink's share is the dense model's always.
    """
    model.eval()
    total = 0.0
    pieces = samples.split(batch)
    for piece in track(pieces, "reading", disable=not show, console=Console(stderr=True), transient=True):
        if memory is None:
            logits = model(piece[:, :-1], use_cache=False).logits.float()
            nats = cross_entropy(logits.flatten(0, 1), piece[:, 1:].flatten(), reduction="none")
        else:
            nats = open_stream(model, memory).surprisal(piece)[:, 1:]
        total += float(nats.double().sum())
    tokens = samples[:, 1:].numel()
    return Evaluation(
        samples=len(samples),
        context=samples.shape[1],
        tokens=tokens,
        bytes=size,
        nats_per_token=total / tokens,
        nats_per_byte=total / size,
        perplexity=math.exp(min(700.0, total / tokens)),
        sink_share=sink_share(model, samples[:batch]),
    )


def table(found: Evaluation) -> Table:
    """The figures, for reading."""
    out = Table("measure", "value")
    out.add_row("samples x tokens", f"{found.samples} x {found.context}")
    out.add_row("nats / token", f"{found.nats_per_token:.4f}")
    out.add_row("nats / byte", f"{found.nats_per_byte:.4f}")
    out.add_row("perplexity / token", f"{found.perplexity:.3f}")
    for layer, share in enumerate(found.sink_share):
        out.add_row(f"sink share, layer {layer}", f"{share:.3f}")
    return out


def main(
    model: Annotated[str, typer.Argument(help="Folder of a model, such as OUT/model of pretrain.")],
    data: Annotated[Path, typer.Option(help="Folder of .txt files to measure on.")],
    context: Annotated[
        int, typer.Option(help="Tokens per sample, sink included; 0: what it was trained on.", min=0)
    ] = 0,
    memory: Annotated[
        str | None, typer.Option(help="Read through this memory, such as 'window(window=64)'; else densely.")
    ] = None,
    samples: Annotated[int, typer.Option(help="At most so many samples, spread over the text.", min=1)] = 160,
    threads: Annotated[int, typer.Option(help="CPU threads.", min=1)] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON instead of the table.")] = False,
) -> None:
    """Nats per token and per byte, perplexity, and how much attention the sink token gets in each layer."""
    torch.set_num_threads(threads)
    disable_progress_bar()
    try:
        if not (Path(model) / "config.json").is_file():
            raise ValueError(f"{model} is not the folder of a model: it holds no config.json")
        if context == 1:
            raise ValueError("a context of 1 is the sink token alone; give at least 2")
        through = None if memory is None else parse(memory)
        files = text_files(data)
        tokenizer = PreTrainedTokenizerFast.from_pretrained(model)
        loaded = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
        ids, size = spread(files, tokenizer, context or loaded.config.max_position_embeddings, samples)
    except (ValueError, OSError) as error:
        typer.echo(f"error: {str(error).splitlines()[0]}", err=True)
        raise typer.Exit(2) from None
    found = evaluate(loaded, ids, size, through, show=not as_json)
    if as_json:
        print(json.dumps(asdict(found)))
    else:
        Console().print(table(found))


if __name__ == "__main__":
    typer.run(main)
