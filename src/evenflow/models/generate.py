"""`model.generate(..., custom_generate=...)` over a bounded memory: transformers prepares, Evenflow reads and writes.

transformers builds logits processors, stopping criteria and the generation configuration as always and then calls
this in place of its own loop, which it follows operation by operation: with a memory that keeps everything the tokens
are those of plain `generate`, sampling included.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList
from transformers.generation.configuration_utils import GenerationMode
from transformers.generation.utils import GenerateDecoderOnlyOutput

from ..memory import Memory
from .stream import open_stream


def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    *,
    memory: Memory,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    streamer: Any = None,
    **inputs: Any,
) -> Tensor | GenerateDecoderOnlyOutput:
    """The decoding loop that `model.generate(custom_generate=...)` calls; greedy search and sampling.

    input_ids [B, T], with `attention_mask` [B, T] for padding. Returns the ids [B, T + n], or with
    `return_dict_in_generate` an output with sequences, scores and logits. Raises ValueError, with the reason, for what
    a bounded memory does not give: beams, embeddings as input, attention weights, a transformers cache to go on from.
    """
    mode = generation_config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise ValueError(
            f"{mode.value.replace('_', ' ')} needs many continuations of one memory; with a bounded memory use greedy "
            "search or sampling (num_beams=1)"
        )
    if generation_config.output_attentions or generation_config.output_hidden_states:
        raise ValueError(
            "attention weights and hidden states are not kept; drop output_attentions/output_hidden_states"
        )
    if inputs.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds cannot be streamed; give input_ids")
    cache = inputs.get("cache", inputs.get("past_key_values"))
    if cache is not None and cache.get_seq_length() > 0:
        raise ValueError("a filled transformers cache cannot be taken over; give the whole text as input_ids")
    streamer = streamer if streamer is not None else _streamer_of_caller(model)
    mask = inputs.get("attention_mask")
    batch, width = input_ids.shape
    stream = open_stream(model, memory, batch=batch, length=max(width, generation_config.max_length or 0) or None)
    pad: Any = generation_config._pad_token_tensor
    ends = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    wants = generation_config.return_dict_in_generate
    scores: Any = () if wants and generation_config.output_scores else None
    raw: Any = () if wants and generation_config.output_logits else None
    going = torch.ones(batch, dtype=torch.bool, device=input_ids.device)
    fresh, real = input_ids, mask
    while True:
        stream.consume(fresh, real)
        logits = stream.last_logits.to(input_ids.device, torch.float32, copy=True)
        chosen = logits_processor(cast(torch.LongTensor, input_ids), logits)
        scores = None if scores is None else (*scores, chosen)
        raw = None if raw is None else (*raw, logits)
        if generation_config.do_sample:
            token = torch.multinomial(torch.softmax(chosen, -1), num_samples=1)[:, 0]
        else:
            token = chosen.argmax(-1)
        if ends:
            token = torch.where(going, token, pad.to(token))
        input_ids = torch.cat([input_ids, token[:, None]], 1)
        if streamer is not None:
            streamer.put(token.cpu())
        # A row that goes on was going on when its token was drawn; ended rows read nothing more.
        going = going & ~stopping_criteria(input_ids, scores)
        if not bool(going.any()):
            break
        fresh, real = token[:, None], None if bool(going.all()) else going[:, None]
    if streamer is not None:
        streamer.end()
    if not wants:
        return input_ids
    return GenerateDecoderOnlyOutput(sequences=cast(torch.LongTensor, input_ids), scores=scores, logits=raw)


def _streamer_of_caller(model: PreTrainedModel) -> Any:
    """The streamer that was given to `model.generate`.

    transformers (seen in 5.24) hands a callable `custom_generate` every argument but the streamer, to which it has
    given the prompt by then; it is still a local variable of the calling `generate`.
    """
    frame = inspect.currentframe()
    while frame is not None:
        names = frame.f_locals
        if frame.f_code.co_name == "generate" and names.get("self") is model and "streamer" in names:
            return names["streamer"]
        frame = frame.f_back
    return None
