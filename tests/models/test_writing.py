"""Writing: `Stream.generate` token by token, and `model.generate(custom_generate=ef.generate)`."""

import inspect
import itertools

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TextStreamer,
)

import evenflow as ef
from evenflow.models import Stream, open_stream
from evenflow.models.sampling import Chooser, uniform

from . import zoo

SPEC = "streaming-llm(sink=3, window=8)"


def tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, with a start and an end token."""
    characters = [chr(code) for code in range(ord("!"), ord("!") + zoo.VOCABULARY - 3)]
    names = ["<pad>", "<s>", "</s>", *characters]
    raw = Tokenizer(models.BPE(vocab={name: n for n, name in enumerate(names)}, merges=[]))
    raw.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=raw, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def opened(spec: str = SPEC, name: str = "llama", **options) -> Stream:
    return ef.open(zoo.shared(name), spec, **options)


def by_hand(stream: Stream, prompt: list[int], count: int) -> list[int]:
    """Greedy writing with nothing but `feed`."""
    out, logits = [], stream.feed(prompt)
    for _ in range(count):
        out.append(int(logits[0, -1].argmax()))
        logits = stream.feed(out[-1:])
    return out


# -- Stream.generate ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [SPEC, "full", "recompute(window=6, sink=2)"])
def test_greedy_writing_is_feeding_the_likeliest_token(spec):
    stream, plain = opened(spec), opened(spec)
    prompt = zoo.tokens(20)[0].tolist()
    assert list(stream.generate(prompt, max_tokens=30)) == by_hand(plain, prompt, 30)
    assert stream.position == plain.position == 50
    assert torch.allclose(stream.last_logits, plain.last_logits, atol=1e-4)


def test_writing_has_no_end_of_its_own():
    stream = opened()
    tokens = list(itertools.islice(stream.generate([5]), 500))
    assert len(tokens) == 500 and all(isinstance(token, int) for token in tokens)


def test_a_dropped_generator_leaves_what_it_yielded():
    stream, plain, ids = opened(), opened(), zoo.tokens(9)[0].tolist()
    writer = stream.generate(ids)
    assert stream.position == 0  # the prompt is read when the first token is asked for
    got = [next(writer) for _ in range(7)]
    writer.close()
    assert stream.position == 9 + 7
    plain.feed(ids + got)
    assert torch.allclose(stream.feed([8, 9]), plain.feed([8, 9]), atol=1e-4)


def test_several_turns_on_one_stream():
    stream, plain = opened(), opened()
    first = list(stream.generate([5, 6, 7], max_tokens=12))
    second = list(stream.generate([8, 9], max_tokens=12))
    third = list(stream.generate(max_tokens=4))
    plain.feed([5, 6, 7, *first])
    assert second == list(plain.generate([8, 9], max_tokens=12))
    assert third == list(plain.generate(max_tokens=4))
    assert list(stream.generate([4], max_tokens=0)) == [] and stream.position == 34


def test_a_long_prompt_is_read_in_chunks():
    prompt = zoo.tokens(1300)
    stream, plain = opened(), opened()
    plain.feed(prompt)
    assert list(stream.generate(prompt, max_tokens=3)) == list(plain.generate(max_tokens=3))
    assert stream.position == 1303


def test_sampling_follows_the_probabilities():
    """20 000 draws against the softmax, by the chi-square of 66 degrees of freedom (99.99 % below 118)."""
    logits = zoo.shared("llama")(input_ids=zoo.tokens(5)).logits[:, -1].detach() / 3
    chooser = Chooser(1.0, 1.0, None, 7, None)
    empty = torch.zeros(1, 0, dtype=torch.long)
    drawn = torch.stack([chooser.choose(empty, logits, [position]) for position in range(20_000)])
    expected = logits.softmax(-1)[0] * 20_000
    counts = torch.bincount(drawn[:, 0], minlength=zoo.VOCABULARY)
    assert float(((counts - expected) ** 2 / expected).sum()) < 118


def test_top_k_and_top_p_leave_out_the_rest():
    logits = torch.tensor([[0.0, 3.0, 2.0, 1.0, -1.0]])
    empty = torch.zeros(1, 0, dtype=torch.long)
    for options, allowed in [
        ((1.0, 1.0, 2), {1, 2}),
        ((1.0, 0.5, None), {1}),
        ((1.0, 0.8, None), {1, 2}),
        ((1e-3, 1.0, None), {1}),
    ]:
        chooser = Chooser(*options, 1, None)
        assert {int(chooser.choose(empty, logits, [n])) for n in range(200)} == allowed


def test_a_seed_makes_writing_repeatable_across_forks_and_resumes(tmp_path):
    stream = opened()
    stream.feed([3, 4, 5])
    stream.save(tmp_path / "a")
    fork, resumed = stream.fork(), ef.resume(zoo.shared("llama"), tmp_path / "a")
    options = {"max_tokens": 40, "temperature": 0.9, "top_p": 0.95, "seed": 11}
    written = list(stream.generate(**options))
    assert written == list(resumed.generate(**options))
    halves = list(fork.generate(**{**options, "max_tokens": 15})) + list(fork.generate(**{**options, "max_tokens": 25}))
    assert halves == written
    torch.manual_seed(5)
    one = list(itertools.islice(opened().generate([3], temperature=1.0), 20))
    torch.manual_seed(5)
    assert one == list(itertools.islice(opened().generate([3], temperature=1.0), 20))
    assert one != list(itertools.islice(opened().generate([3], temperature=1.0), 20))


def test_uniform_is_uniform():
    draws = torch.tensor([uniform(3, row, position) for row in range(10) for position in range(2000)])
    assert float(draws.min()) >= 0 and float(draws.max()) < 1
    assert abs(float(draws.mean()) - 0.5) < 0.01
    counts = torch.histc(draws, 20, 0, 1)
    assert float(((counts - 1000) ** 2 / 1000).sum()) < 52  # chi-square, 19 degrees of freedom, 99.99 %
    neighbours = torch.corrcoef(torch.stack([draws[:-1], draws[1:]]))[0, 1]
    assert abs(float(neighbours)) < 0.03


def test_text_prompts_get_special_tokens_at_the_start_only():
    class Marked(PreTrainedTokenizerFast):
        def encode(self, text, add_special_tokens=True, **options):
            return ([1] if add_special_tokens else []) + super().encode(text, add_special_tokens=False, **options)

    marked = Marked(tokenizer_object=tokenizer()._tokenizer)
    stream = opened(tokenizer=marked)
    list(stream.generate("ABC", max_tokens=2))
    assert stream.position == 1 + 3 + 2
    list(stream.generate("ABC", max_tokens=2))
    assert stream.position == 6 + 3 + 2


def test_stop_strings_end_a_turn_even_across_tokens():
    stream = opened(tokenizer=tokenizer())
    free = list(opened().generate([9, 10], max_tokens=40))
    text = stream.tokenizer.decode(free)
    stop = text[10:13]
    got = list(stream.generate([9, 10], max_tokens=40, stop=["\x00", stop]))
    shown = stream.tokenizer.decode(got)
    assert shown.endswith(stop) and shown == text[: text.index(stop) + 3]
    assert stream.position == 2 + len(got)
    # A stop string of an earlier turn does not end the next one.
    assert len(list(stream.generate(max_tokens=5, stop=stop + "!"))) == 5


def test_end_of_text_ends_a_row_when_asked():
    free = list(opened().generate([9, 10], max_tokens=30))
    end = free[12]
    cut = free[: free.index(end) + 1]
    assert list(opened().generate([9, 10], max_tokens=30, eos=end)) == cut
    assert list(opened().generate([9, 10], max_tokens=30, eos=[end, 66])) == cut
    model = zoo.fresh("llama")
    model.generation_config.eos_token_id = end
    assert list(ef.open(model, SPEC).generate([9, 10], max_tokens=30, eos=True)) == cut
    model.generation_config.eos_token_id = None
    assert list(ef.open(model, SPEC).generate([9, 10], max_tokens=30)) == free
    with pytest.raises(ValueError, match="neither model nor tokenizer"):
        ef.open(model, SPEC).generate([9, 10], eos=True)


def test_prompts_of_different_length_in_one_batch():
    prompts = [[5, 6, 7, 8, 9], [10], [11, 12, 13]]
    stream = opened(batch=3)
    together = torch.stack(list(stream.generate(prompts, max_tokens=20)))
    assert stream.positions.tolist() == [25, 21, 23]
    for row, prompt in enumerate(prompts):
        assert together[:, row].tolist() == list(opened().generate(prompt, max_tokens=20))
    texts = opened(batch=2, tokenizer=tokenizer())
    token = next(texts.generate(["ABCD", "E"], max_tokens=1))
    assert token.shape == (2,) and texts.positions.tolist() == [5, 2]


def test_rows_end_on_their_own():
    prompts = [[5, 6, 7], [10, 11, 12]]
    alone = [list(opened().generate(prompt, max_tokens=30)) for prompt in prompts]
    end = alone[0][6]
    expected = [row[: row.index(end) + 1] if end in row else row for row in alone]
    stream = opened(batch=2)
    got = torch.stack(list(stream.generate(prompts, max_tokens=30, eos=end)))
    for row in range(2):
        assert got[: len(expected[row]), row].tolist() == expected[row]
        assert bool((got[len(expected[row]) :, row] == -1).all())
    assert stream.positions.tolist() == [3 + len(row) for row in expected]
    # The next turn goes on from where each row ended.
    plain = opened()
    plain.feed(prompts[0] + expected[0])
    assert torch.stack(list(stream.generate(max_tokens=4)))[:, 0].tolist() == list(plain.generate(max_tokens=4))


def test_processors_see_the_ids_of_the_turn():
    seen = []

    class Note(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return scores

    processors = LogitsProcessorList([Note(), RepetitionPenaltyLogitsProcessor(1e6)])
    written = list(opened().generate([5, 6], max_tokens=20, logits_processor=processors))
    assert len(set(written)) == 20 and not {5, 6} & set(written)
    assert seen[3] == [[5, 6, *written[:3]]]
    assert len(processors) == 2  # what the caller gave is not added to


BAD = {
    "temperature": ({"temperature": -1}, "temperature is -1"),
    "nan temperature": ({"temperature": float("nan")}, "temperature is nan"),
    "top_p": ({"top_p": 0}, "top_p is 0"),
    "top_k": ({"top_k": 0}, "top_k is 0"),
    "max_tokens": ({"max_tokens": -3}, "max_tokens is -3"),
    "stop without tokenizer": ({"stop": "a"}, "needs a stream with a tokenizer"),
    "text without tokenizer": ({"prompt": "hello"}, "has no tokenizer"),
    "eos": ({"eos": "</s>"}, "expected token ids"),
    "empty": ({"prompt": []}, "no ids"),
    "out of range": ({"prompt": [99]}, "out of range"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_are_refused_at_once(case):
    options, message = BAD[case]
    stream = opened()
    with pytest.raises(ValueError, match=message):
        stream.generate(**{"prompt": [3], **options})
    assert stream.position == 0


def test_a_batch_needs_one_prompt_per_row_and_none_empty():
    stream = opened(batch=2, tokenizer=tokenizer())
    with pytest.raises(ValueError, match="give one text per row"):
        stream.generate("A")
    with pytest.raises(ValueError, match="prompt is empty"):
        stream.generate([[1, 2], []])
    stream.feed([[1, 2], [3, 4]], torch.tensor([[1, 1], [0, 0]]))
    with pytest.raises(ValueError, match="every row"):
        stream.generate()
    with pytest.raises(ValueError, match="nothing to go on from"):
        _ = opened().last_logits


def test_a_fresh_stream_starts_with_the_start_token():
    assert list(opened().generate(max_tokens=9)) == list(opened().generate([1], max_tokens=9))
    assert torch.stack(list(opened(batch=2).generate(max_tokens=9)))[:, 1].tolist() == list(
        opened().generate([1], max_tokens=9)
    )
    model = zoo.fresh("llama")
    model.generation_config.bos_token_id = None
    assert list(ef.open(model, SPEC, tokenizer=tokenizer()).generate(max_tokens=9)) == list(
        opened().generate([1], max_tokens=9)
    )
    with pytest.raises(ValueError, match="nothing to go on from"):
        ef.open(model, SPEC).generate()


# -- model.generate(custom_generate=ef.generate) ---------------------------------------------------------------------

PLAIN = {
    "greedy": {"do_sample": False, "max_new_tokens": 20},
    "sampling": {"do_sample": True, "max_new_tokens": 20, "temperature": 0.8, "top_k": 20, "top_p": 0.9},
    "penalties": {"do_sample": False, "max_new_tokens": 20, "repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "end of text": {"do_sample": True, "max_new_tokens": 60, "eos_token_id": [4, 9, 12, 30], "pad_token_id": 0},
    "at least": {
        "do_sample": True,
        "min_new_tokens": 10,
        "max_new_tokens": 30,
        "eos_token_id": [4, 9],
        "pad_token_id": 0,
    },
    "max_length": {"do_sample": False, "max_length": 25},
    "several": {"do_sample": True, "max_new_tokens": 12, "num_return_sequences": 3},
}


@pytest.mark.parametrize("case", PLAIN)
@pytest.mark.parametrize("name", ["llama", "gemma3", "bloom", "falcon", "mpt"])
def test_with_everything_kept_it_is_plain_generate(name, case):
    model, ids, options = zoo.shared(name), zoo.tokens(9, 2), {"pad_token_id": 0, **PLAIN[case]}
    torch.manual_seed(3)
    plain = model.generate(ids, **options)
    torch.manual_seed(3)
    streamed = model.generate(ids, custom_generate=ef.generate, memory="full", **options)
    assert torch.equal(streamed, plain)
    torch.manual_seed(3)
    assert torch.equal(ef.generate(model, ids, memory="full", **options), plain)


def test_left_padded_prompts():
    model, ids = zoo.shared("llama"), zoo.tokens(9, 3)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :4] = mask[2, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 15, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(ids, **options)
    assert torch.equal(model.generate(ids, custom_generate=ef.generate, memory="full", **options), plain)
    short = model.generate(ids, custom_generate=ef.generate, memory=SPEC, **options)
    end = model.config.eos_token_id
    for row in range(3):
        alone = list(opened().generate(ids[row, mask[row] == 1], max_tokens=15, eos=end))
        assert short[row, 9:].tolist() == alone + [0] * (15 - len(alone))


def test_with_a_bounded_memory_it_is_the_stream():
    model, ids = zoo.shared("llama"), zoo.tokens(30)
    got = model.generate(ids, custom_generate=ef.generate, memory=SPEC, max_new_tokens=40, do_sample=False)
    assert got[0, 30:].tolist() == list(opened().generate(ids, max_tokens=40))
    memory = ef.recipe("streaming-llm", sink=3, window=8)
    assert torch.equal(model.generate(ids, custom_generate=ef.generate, memory=memory, max_new_tokens=40), got)


def test_streamers_processors_and_criteria_are_honoured(capsys):
    model, ids, words = zoo.shared("llama"), zoo.tokens(5), tokenizer()
    puts = []

    class Puts:
        def put(self, value):
            puts.append(value.flatten().tolist())

        def end(self):
            puts.append("end")

    class Never(LogitsProcessor):
        def __call__(self, input_ids, scores):
            return scores.index_fill(1, torch.arange(3, 40), -torch.inf)

    class Until(StoppingCriteria):
        def __call__(self, input_ids, scores, **options):
            return torch.full((len(input_ids),), input_ids.shape[1] >= 12)

    options = {"do_sample": False, "max_new_tokens": 30}
    hooks = {
        "logits_processor": LogitsProcessorList([Never()]),
        "stopping_criteria": StoppingCriteriaList([Until()]),
    }
    plain = model.generate(ids, **options, **hooks)
    hooks["streamer"] = Puts()
    got = model.generate(ids, custom_generate=ef.generate, memory="full", **options, **hooks)
    assert torch.equal(got, plain) and got.shape[1] == 12 and bool((got[0, 5:] >= 40).all())
    assert puts == [ids[0].tolist(), *([token] for token in got[0, 5:].tolist()), "end"]
    streamer = TextStreamer(words, skip_prompt=True)
    got = ef.generate(model, ids, memory="full", streamer=streamer, **options)
    assert capsys.readouterr().out.strip() == words.decode(got[0, 5:])


def test_stop_strings_end_generate_where_they_end_plain_generate():
    shipped = ef.open("tiny", "full")
    model, words = shipped.model, shipped.tokenizer
    ids = torch.tensor([words.encode("The old man")])
    text = words.decode(model.generate(ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :])
    stop = text[20:26]
    options = {"max_new_tokens": 40, "do_sample": False}
    plain = model.generate(ids, stop_strings=stop, tokenizer=words, **options)
    assert plain.shape[1] < ids.shape[1] + 40
    assert torch.equal(ef.generate(model, ids, memory="full", stop_strings=stop, tokenizer=words, **options), plain)
    criteria = StoppingCriteriaList([StopStringCriteria(words, stop)])
    got = model.generate(ids, custom_generate=ef.generate, memory="full", stopping_criteria=criteria, **options)
    assert torch.equal(got, plain)


def test_return_dict_holds_scores_and_logits():
    model, ids = zoo.shared("llama"), zoo.tokens(5)
    options = {
        "do_sample": True, "top_k": 5, "max_new_tokens": 6, "return_dict_in_generate": True, "output_scores": True,
        "output_logits": True,
    }  # fmt: skip
    torch.manual_seed(0)
    plain = model.generate(ids, **options)
    torch.manual_seed(0)
    got = model.generate(ids, custom_generate=ef.generate, memory="full", **options)
    assert torch.equal(got.sequences, plain.sequences)
    for field in ("scores", "logits"):
        for one, other in zip(getattr(got, field), getattr(plain, field), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


REFUSED = {
    "beams": ({"num_beams": 3}, "beam search needs many continuations"),
    "attentions": ({"output_attentions": True, "return_dict_in_generate": True}, "are not kept"),
    "a typo in memory": ({"memory": "streeming-llm"}, "did you mean 'streaming-llm'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_bounded_memory_cannot_give_is_refused(case):
    options, message = REFUSED[case]
    model = zoo.fresh("llama")
    model.set_attn_implementation("eager")
    with pytest.raises(ValueError, match=message):
        model.generate(zoo.tokens(5), custom_generate=ef.generate, max_new_tokens=3, **{"memory": SPEC, **options})


def test_embeddings_and_filled_caches_are_refused():
    model, ids = zoo.shared("llama"), zoo.tokens(5)
    with pytest.raises(ValueError, match="inputs_embeds"):
        model.generate(inputs_embeds=torch.randn(1, 4, 32), custom_generate=ef.generate, memory=SPEC, max_new_tokens=3)
    with torch.no_grad():
        cache = model(input_ids=ids, use_cache=True)[1]
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    with pytest.raises(ValueError, match="filled transformers cache"):
        ef.generate(model, torch.cat([ids, ids], 1), memory=SPEC, max_new_tokens=3, **{name: cache})


def test_longrope_without_a_bound_is_made_for_the_length_that_is_asked():
    """Plain generate turns to the long factors only beyond the original length, and so must this."""
    torch.manual_seed(0)
    rope = {
        "rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [1.5, 2.0, 3.0, 4.0],
        "original_max_position_embeddings": 32,
    }  # fmt: skip
    model = zoo.small(
        "Phi3", max_position_embeddings=128, original_max_position_embeddings=32, sliding_window=None,
        rope_parameters=rope,
    )().eval()  # fmt: skip
    ids = zoo.tokens(8)
    plain = model.generate(ids, max_new_tokens=20, do_sample=False)
    assert torch.equal(ef.generate(model, ids, memory="full", max_new_tokens=20, do_sample=False), plain)
    stream = open_stream(model, ef.recipe("full"), length=28)
    assert list(stream.generate(ids, max_tokens=20)) == plain[0, 8:].tolist()
