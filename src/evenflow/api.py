"""The verbs of everyday use, which take a memory by its name: open, resume, generate; video, resume_video."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
    StopStringCriteria,
)

from .generate import Guidance, NoiseControl, Schedule, VideoStream
from .generate import resume_stream as resume_video_stream
from .memory import Memory
from .models import Stream, open_stream, resume_stream, unfit
from .models.generate import generate as generate_over
from .recipes import parse, recipe, recipes

DEFAULT = "streaming-llm(sink=4, window=1020)"


def memory_for_text(memory: str | Memory) -> Memory:
    """The memory that a spec names, or the one given. Raises ValueError, with the reason, where it cannot read text."""
    if not isinstance(memory, (str, Memory)):
        raise TypeError(f"memory is a {type(memory).__name__}; expected a spec such as {DEFAULT!r} or a Memory")
    chosen = parse(memory) if isinstance(memory, str) else memory
    if (reason := unfit(chosen)) is not None:
        fit = ", ".join(info.name for info in recipes("memory") if unfit(recipe(info.name)) is None)
        raise ValueError(f"{chosen.name} cannot read text: {reason}; use one of {fit}")
    return chosen


def open(
    model: PreTrainedModel | str | os.PathLike[str],
    memory: str | Memory = DEFAULT,
    *,
    tokenizer: Any = None,
    batch: int | None = None,
    dtype: torch.dtype | str | None = None,
    undo: int = 16,
) -> Stream:
    """Open an endless stream through a language model: flat memory, flat cost per token.

    model: a `transformers` decoder, the path of a model folder, a hub name, or "tiny", the shipped model. memory: a
    spec such as "streaming-llm(sink=4, window=1020)" or a `Memory`. tokenizer: lets prompts be text; found by itself
    for a path. batch: number of independent rows, by default as many as the first feed brings. dtype: of the weights
    of a model that is loaded here. undo: how many of the last tokens `truncate` can take back from layers that keep a
    matrix in place of keys (Qwen3-Next, Qwen3.5); other models do not look at it.

    Raises ValueError for a wrong spec (naming the nearest right one) and for a model that cannot be streamed (saying
    why), TypeError for what is no model, FileNotFoundError for a folder that is not there.
    """
    return open_stream(model, memory_for_text(memory), tokenizer=tokenizer, batch=batch, dtype=dtype, undo=undo)


def resume(
    model: PreTrainedModel | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    memory: str | Memory | None = None,
    tokenizer: Any = None,
    dtype: torch.dtype | str | None = None,
) -> Stream:
    """Go on, bit for bit, with a stream that `Stream.save` wrote.

    memory: only needed for a `Memory` of your own; a recipe is found by its name in the file. Raises ValueError when
    the file is missing or damaged (checksum), or was written by another model or with another memory.
    """
    return resume_stream(
        model, path, parse if memory is None else memory_for_text(memory), tokenizer=tokenizer, dtype=dtype
    )


def generate(
    model: Any,
    input_ids: Tensor,
    *,
    memory: str | Memory = DEFAULT,
    logits_processor: LogitsProcessorList | None = None,
    stopping_criteria: StoppingCriteriaList | None = None,
    generation_config: GenerationConfig | None = None,
    streamer: Any = None,
    **kwargs: Any,
) -> Any:
    """What to give transformers: `model.generate(**inputs, custom_generate=ef.generate, memory=...)`.

    input_ids [B, T]; everything `model.generate` takes for greedy search and sampling works as there: streamers,
    logits processors, stopping criteria, left-padded batches, `num_return_sequences`, `return_dict_in_generate`.
    Returns what it returns, ids [B, T + n]. Called directly, it calls `model.generate` in this way itself, and then
    takes `stop_strings` with `tokenizer` too; transformers (seen in 5.24) refuses those two beside a callable
    `custom_generate`, where `stopping_criteria=[StopStringCriteria(tokenizer, strings)]` does the same. Raises
    ValueError with the reason for beam search and others that need more than one continuation.
    """
    chosen = memory_for_text(memory)
    if generation_config is None or logits_processor is None or stopping_criteria is None:
        if kwargs.get("stop_strings") and kwargs.get("tokenizer"):
            stops = StopStringCriteria(kwargs.pop("tokenizer"), kwargs.pop("stop_strings"))
            stopping_criteria = StoppingCriteriaList([*(stopping_criteria or ()), stops])
        return model.generate(
            input_ids, custom_generate=generate, memory=chosen, logits_processor=logits_processor,
            stopping_criteria=stopping_criteria, generation_config=generation_config, streamer=streamer, **kwargs,
        )  # fmt: skip
    return generate_over(
        model, input_ids, memory=chosen, logits_processor=logits_processor, stopping_criteria=stopping_criteria,
        generation_config=generation_config, streamer=streamer, **kwargs,
    )  # fmt: skip


def video(
    model: Any = "tiny",
    prompt: str | Mapping[str, float] = "",
    *,
    memory: str | Memory | None = "default",
    schedule: str | Schedule = "chunks",
    seed: int = 0,
    guidance: Guidance | float | None = None,
    size: tuple[int, int] | None = None,
    strength: float | NoiseControl | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> VideoStream:
    """Open an endless video: `for chunk in ef.video("tiny", "a red ball rolls"): show(chunk.frames)`.

    model: a `VideoModel`, the path of its files, or "tiny", the shipped one. prompt: a text, or texts with weights.
    memory: a spec such as "longlive(window=12, sink=3)" or a `Memory`; "default" is what the schedule was published
    with, None remembers nothing. schedule: "chunks", "rolling(levels=5)", "buffer(0, 8, 2, 1)", "batch", "knots" or
    a `Schedule`. guidance: for models that are not distilled. size: rows and columns of pixels. strength: a video that
    is watched is restyled, the more the nearer to 1; a `NoiseControl` does so less where it moves. dtype, device: of
    the weights of a model that is loaded here.

    Raises ValueError for a wrong spec (naming the nearest right one), and, with the reason, where memory, schedule and
    model do not go together.
    """
    return VideoStream(_video_model(model, dtype, device), prompt, memory, schedule, seed, guidance, size, strength)


def resume_video(
    model: Any,
    path: str | os.PathLike[str],
    *,
    memory: Memory | None = None,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str = "cpu",
) -> VideoStream:
    """Go on, bit for bit, with a video that `VideoStream.save` wrote.

    memory: only needed for a `Memory` of your own. Raises ValueError when the file is missing or damaged (checksum), or
    was written by another model or with another memory.
    """
    return resume_video_stream(_video_model(model, dtype, device), path, memory)


def _video_model(model: Any, dtype: torch.dtype | str | None, device: torch.device | str) -> Any:
    if not isinstance(model, (str, os.PathLike)):
        return model
    from .models.video import load_video

    return load_video(model, dtype, device)
