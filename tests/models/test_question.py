"""Questions to a stream: answered from what it remembers, heard by nobody, any number at once."""

import threading

import pytest
import torch

import evenflow as ef

from . import zoo
from .test_stream import near, unchanged

WHOLE = "live-vlm(cache_size=200, recent_frames=4, clip_frames=8, observe=4, page=4, retr_ratio=1.0, prompt=2, frame=1)"
SHARE = WHOLE.replace("retr_ratio=1.0", "retr_ratio=0.3")
BLOCKS = "rekv(n_init=2, n_local=100, retrieve_size=10, frame=4)"
FEW = "rekv(n_init=2, n_local=9, retrieve_size=2, frame=4)"


def asked(spec: str, batch: int = 1, length: int = 40) -> tuple[ef.models.Stream, torch.Tensor]:
    stream, ids = ef.open(zoo.shared("llama"), spec), zoo.tokens(length, batch)
    stream.feed(ids)
    return stream, ids


def dense(ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return zoo.shared("llama")(ids).logits


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("spec", [WHOLE, BLOCKS])
def test_where_everything_is_brought_back_the_answer_is_the_models_own(spec, batch):
    stream, ids = asked(spec, batch)
    prompt = zoo.tokens(9, batch, seed=3)
    for select in (zoo.tokens(5, batch, seed=4), None):
        question = stream.question(select)
        near(question.feed(prompt), dense(torch.cat([ids, prompt], 1))[:, -9:])
    assert stream.question(prompt).position == 40


def test_an_answer_is_written_as_the_model_would():
    stream, ids = asked(WHOLE)
    prompt = zoo.tokens(6, seed=3)
    answer = list(stream.question(prompt).generate(prompt, max_tokens=8))
    text = torch.cat([ids, prompt], 1)
    for token in answer:
        assert int(dense(text)[0, -1].argmax()) == token
        text = torch.cat([text, torch.tensor([[token]])], 1)


def test_only_what_the_question_attends_to_is_read():
    stream, _ = asked(SHARE)
    whole, _ = asked(WHOLE)
    one, other = (stream.question(zoo.tokens(3, seed=seed)) for seed in (8, 9))
    held = [[question.state.held(layer) for layer in range(2)] for question in (one, other)]
    assert held[0] != held[1]
    assert all(len(layer) < len(whole.question(zoo.tokens(3)).state.held(0)) for layer in held[0] + held[1])


@pytest.mark.parametrize("spec", [WHOLE, SHARE, BLOCKS, FEW, "streaming-llm(sink=3, window=8)", "recompute(window=6)"])
def test_the_stream_never_learns_of_it_and_the_same_question_gets_the_same_answer(spec):
    stream, _ = asked(spec)
    before, prompt, more = stream.fork(), zoo.tokens(7, seed=3), zoo.tokens(12, seed=6)
    first = stream.question(prompt)
    now = first.feed(prompt)
    unchanged(stream, before)
    waiting = stream.question(prompt)
    assert torch.equal(stream.feed(more), before.feed(more))
    assert torch.equal(waiting.feed(prompt), now)  # it stands at the moment at which it was asked
    assert torch.equal(first.fork().feed(more), first.feed(more))


def test_any_number_at_once_while_the_stream_goes_on():
    stream, ids = asked(SHARE)
    alone, prompts = stream.fork(), [zoo.tokens(6, seed=seed) for seed in range(4)]
    expected = [alone.question(prompt).feed(prompt) for prompt in prompts]
    questions = [stream.question() for _ in prompts]
    got: dict[int, torch.Tensor] = {}

    def answer(number: int) -> None:
        got[number] = questions[number].feed(prompts[number])

    threads = [threading.Thread(target=answer, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    stream.feed(ids)
    for thread in threads:
        thread.join()
    looked = [alone.question() for _ in prompts]
    for number, prompt in enumerate(prompts):
        assert torch.equal(got[number], looked[number].feed(prompt))
        assert got[number].shape == expected[number].shape


def test_what_cannot_be_asked_says_why(tmp_path):
    stream = ef.open(zoo.shared("llama"), WHOLE)
    with pytest.raises(ValueError, match="nothing to ask about"):
        stream.question([3, 4])
    stream.feed(zoo.tokens(20))
    with pytest.raises(ValueError, match="out of range"):
        stream.question([10**6])
    question = stream.question([3, 4])
    with pytest.raises(ValueError, match="nothing to go on from"):
        next(question.generate())
    with pytest.raises(ValueError, match="save the stream it was asked of"):
        question.save(tmp_path / "state")
    assert not list(tmp_path.iterdir())
