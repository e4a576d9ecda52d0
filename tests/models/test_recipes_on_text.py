"""Every recipe on a text: it is read and written by a language model, or refused with the reason."""

import pytest
import torch

import evenflow as ef
from evenflow.memory import Absolute, LastByModality, LastSeconds, Memory, Oldest
from evenflow.models import Stream, open_stream, unfit

from ..recipes.cases import CASES
from . import zoo

EVERY = sorted(info.name for info in ef.recipes("memory"))
READERS = [name for name in EVERY if unfit(ef.recipe(name)) is None]


def opened(name: str, **options: object) -> Stream:
    """A stream through the recipe at a size that this length of text outgrows."""
    memory = ef.recipe(name, **CASES[name].params)
    return ef.open(zoo.shared("gpt-oss" if memory.null == "learned" else "llama"), memory, **options)


def near(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=1e-5 * max(1.0, float(other.abs().max())))


@pytest.mark.parametrize("name", EVERY)
def test_every_recipe_is_opened_or_refused_with_the_reason(name):
    model = zoo.shared("gpt-oss")
    if name in READERS:
        assert ef.open(model, name, batch=1).feed(zoo.tokens(3)).isfinite().all()
        return
    with pytest.raises(ValueError, match="see each other both ways") as refused:
        ef.open(model, name)
    assert str(refused.value).startswith(f"{name} cannot read text: ")
    assert str(refused.value).endswith(f"use one of {', '.join(READERS)}")
    with pytest.raises(ValueError, match=f"{name} cannot read text"):
        ef.generate(model, zoo.tokens(3), memory=name, max_new_tokens=1)


@pytest.mark.parametrize("name", EVERY)
def test_what_reads_text_is_what_sees_only_what_came_before(name):
    memory = ef.recipe(name)
    assert (name in READERS) == (memory.inside == "causal" and memory.rows == 1)


@pytest.mark.parametrize(
    ("memory", "reason"),
    [
        (Memory(frame=4, evict=Oldest(with_fresh=True), window=9), r"frames \(frame=4\)"),
        (Memory(frame=None, window=9), r"frames \(frame=None\)"),
        (Memory(rows=2, window=9), "2 copies, one for every denoising step"),
        (Memory(evict=LastSeconds(30.0)), "counts by the tag 'time'"),
    ],
)
def test_compositions_that_no_text_suits(memory, reason):
    for attempt in (ef.open, open_stream):
        with pytest.raises(ValueError, match=rf"memory cannot read text: .*{reason}"):
            attempt(zoo.shared("llama"), memory)


def test_a_budget_of_words_reads_a_text_like_a_window():
    ids = zoo.tokens(40)
    budget = Memory(sink=2, evict=LastByModality({0: 9}), place=Absolute())
    window = ef.open(zoo.shared("llama"), Memory(sink=2, window=9, place=Absolute())).feed(ids)
    near(ef.open(zoo.shared("llama"), budget).feed(ids), window)


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("cuts", [[1], [7], [30, 1, 13]])
def test_any_cut_reads_the_same(name, cuts):
    ids = zoo.tokens(44)
    whole, pieces, outputs = opened(name), opened(name), []
    while pieces.position < 44:
        at = pieces.position
        outputs.append(pieces.feed(ids[:, at : at + cuts[len(outputs) % len(cuts)]]))
    near(torch.cat(outputs, 1), whole.feed(ids))
    near(pieces.last_logits, whole.last_logits)


@pytest.mark.parametrize("name", READERS)
def test_padded_rows_read_what_they_read_alone(name):
    ids, lengths = zoo.tokens(24, 2), (24, 15)
    mask = torch.arange(24) >= 24 - torch.tensor(lengths)[:, None]
    mask[1, 14] = False  # and a hole
    together = opened(name, batch=2)
    got = together.feed(ids, mask)
    got = torch.cat([got, together.feed(ids[:, :5])], 1)
    for row in range(2):
        alone = opened(name)
        real = torch.cat([ids[row][mask[row]], ids[row, :5]])
        near(got[row][torch.cat([mask[row], torch.ones(5, dtype=torch.bool)])], alone.feed(real)[0])
        assert int(together.positions[row]) == alone.position


@pytest.mark.parametrize("name", READERS)
def test_written_saved_and_resumed(name, tmp_path):
    stream = opened(name, batch=1)
    stream.feed(zoo.tokens(20))
    first = list(stream.generate(max_tokens=8))
    stream.save(tmp_path / "stream")
    again = ef.resume(stream.model, tmp_path / "stream")
    assert list(again.generate(max_tokens=6)) == list(stream.generate(max_tokens=6)) and len(first) == 8


@pytest.mark.parametrize("name", [name for name in READERS if not ef.recipe(name).cut_free])
def test_a_feed_that_fails_on_its_way_leaves_the_stream_where_it_was(name, monkeypatch):
    stream = opened(name)
    stream.feed(zoo.tokens(20))
    before = stream.fork()
    read, calls = stream._engine.decoder.read, []

    def interrupted(*given: object, **options: object) -> torch.Tensor:
        calls.append(given)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return read(*given, **options)

    with monkeypatch.context() as patch:
        patch.setattr(stream._engine.decoder, "read", interrupted)
        with pytest.raises(KeyboardInterrupt):
            stream.feed(zoo.tokens(9))
    assert stream.position == before.position == 20
    assert torch.equal(stream.feed(zoo.tokens(9)), before.feed(zoo.tokens(9)))
    stream.reset()
    assert stream.position == 0
