"""Hybrids of attention and gated delta layers: the session keeps both, and takes both back."""

import contextlib
import copy
from functools import cache
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import PreTrainedModel

import evenflow as ef
from evenflow.models import Stream, open_stream
from evenflow.recipes import parse

from .. import oracles
from . import zoo

every_hybrid = pytest.mark.parametrize("name", zoo.HYBRIDS)
LENGTH, BOUNDED = 75, "streaming-llm(sink=2, window=9)"


@cache
def doubled(name: str) -> PreTrainedModel:
    return copy.deepcopy(zoo.shared(name)).double()


@contextlib.contextmanager
def wide():
    """The classes compute the delta rule in float32 whatever they are; here they stay as wide as what they are given."""
    to = Tensor.to

    def stay(x: Tensor, *args, **options) -> Tensor:
        if x.dtype == torch.float64:
            args = tuple(torch.float64 if arg is torch.float32 else arg for arg in args)
        return to(x, *args, **options)

    with oracles.doubles(), mock.patch.object(Tensor, "to", stay):
        yield


def opened(name: str, spec: str = BOUNDED, undo: int = 8, batch: int | None = None, model=None) -> Stream:
    return open_stream(model or zoo.shared(name), parse(spec), undo=undo, batch=batch)


def own(model: PreTrainedModel, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids, use_cache=False).logits


@every_hybrid
def test_in_any_cut_it_is_the_models_own_forward(name):
    model, ids = doubled(name), zoo.tokens(LENGTH, 2)
    with wide():
        want = own(model, ids)
        for size in (7, 64, LENGTH):
            stream = opened(name, "full", batch=2, model=model)
            got = torch.cat([stream.feed(piece) for piece in ids.split(size, 1)], 1)
            assert oracles.relative_error(got, want) <= 1e-10
    narrow = opened(name, "full", batch=2)
    got = torch.cat([narrow.feed(piece) for piece in ids.split(7, 1)], 1)
    # The class's two forms, one for chunks and one for single tokens, both in float32, differ by as much.
    assert oracles.relative_error(got, own(zoo.shared(name), ids)) <= 2e-4


@every_hybrid
def test_with_a_window_it_is_the_model_over_a_cache_that_forgets(name):
    """The oracle's cache keeps raw keys; matrix layers are the model's own, over transformers' own cache of them."""
    from transformers import DynamicCache

    model, ids = doubled(name), zoo.tokens(40)
    rotary = model.model.rotary_emb

    class Forgetting(DynamicCache):
        def __init__(self):
            super().__init__(config=model.config)
            self.raw = oracles.RawKeyCache(2, 9, [rotary.inv_freq.double()] * 4)

        def update(self, key, value, layer_idx, *args, **options):
            return self.raw.update(key, value, layer_idx)

        def get_seq_length(self, layer_idx=0):
            return self.raw.get_seq_length(1)

        def get_query_offset(self, layer_idx=0):
            return self.raw.get_seq_length(1)

        def get_mask_sizes(self, query_length, layer_idx=0):
            return self.raw.get_mask_sizes(query_length, 1)

    with wide():
        kept, want = Forgetting(), []
        with torch.no_grad():
            for token in ids.split(1, 1):
                zero = torch.zeros_like(token)
                want.append(model(input_ids=token, position_ids=zero, cache=kept, use_cache=True).logits)
        want = torch.cat(want, 1)
        assert oracles.relative_error(want, own(model, ids)) >= 1e-3
        for size in (7, 40):
            stream = opened(name, model=model)
            got = torch.cat([stream.feed(piece) for piece in ids.split(size, 1)], 1)
            assert oracles.relative_error(got, want) <= 1e-10


@every_hybrid
def test_undoing_is_as_if_it_had_never_come(name):
    """Tokens that came one by one, bit for bit; within a longer step, to the rounding of the class."""
    ids = zoo.tokens(60)
    stream, other = (opened(name, "streaming-llm(sink=2, window=200)") for _ in range(2))
    for token in ids[:, :40].split(1, 1):
        stream.feed(token)
    for token in ids[:, :33].split(1, 1):
        other.feed(token)
    stream.truncate(7)
    assert stream.position == 33
    assert torch.equal(stream.feed(ids[:, 40:50]), other.feed(ids[:, 40:50]))
    stream.truncate(3)
    again = stream.feed(ids[:, 50:])
    other.truncate(3)
    assert torch.equal(again, other.feed(ids[:, 50:]))


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=6), undo=st.integers(1, 9), data=st.data(),
    name=st.sampled_from(list(zoo.HYBRIDS)),
)  # fmt: skip
@settings(max_examples=12, deadline=None)
def test_as_many_as_promised_can_always_be_undone(sizes, undo, data, name):
    model, ids = doubled(name), zoo.tokens(120)
    with wide():
        stream, told = opened(name, "full", undo, model=model), 0
        for size in sizes:
            stream.feed(ids[:, told : told + size])
            told += size
        back = data.draw(st.integers(0, min(undo, told)))
        stream.truncate(back)
        got = stream.feed(ids[:, told : told + 2])
        plain = opened(name, "full", 0, model=model)
        if told > back:
            plain.feed(ids[:, : told - back])
        assert oracles.relative_error(got, plain.feed(ids[:, told : told + 2])) <= 1e-10


@every_hybrid
def test_undoing_too_much_is_refused_and_changes_nothing(name):
    ids = zoo.tokens(60)
    stream = opened(name, "full")
    stream.consume(ids[:, :40])
    stream.consume(ids[:, 40:50])
    before = stream.fork()
    for n in (11, 51, -1, 1.5):
        with pytest.raises(ValueError, match="cannot undo"):
            stream.truncate(n)
    with pytest.raises(ValueError, match="open it with a larger undo"):
        kept = opened(name, "full", 0)
        kept.consume(ids)
        kept.truncate(1)
    full = opened(name)  # matrices could go back by as much, but what has left the window is gone
    for token in ids.split(1, 1):
        full.consume(token)
    unhurt = full.fork()
    with pytest.raises(ValueError, match="cannot undo 5"):
        full.truncate(5)
    assert torch.equal(full.feed(ids), unhurt.feed(ids))
    assert torch.equal(stream.feed(ids[:, 50:]), before.feed(ids[:, 50:]))


@every_hybrid
def test_saved_and_resumed_it_goes_on_bit_for_bit(name, tmp_path):
    ids = zoo.tokens(60, 2)
    stream = opened(name, batch=2)
    stream.feed(ids[:, :40])
    stream.save(tmp_path / "a")
    resumed = ef.resume(zoo.shared(name), tmp_path / "a")
    assert torch.equal(resumed.last_logits, stream.last_logits)
    for size in (1, 19):
        assert torch.equal(resumed.feed(ids[:, 40 : 40 + size]), stream.feed(ids[:, 40 : 40 + size]))


@every_hybrid
def test_a_state_that_does_not_fit_changes_nothing(name):
    ids = zoo.tokens(30)
    stream = opened(name)
    stream.feed(ids[:, :20])
    state, before = stream._engine.state_dict(), stream.fork()
    matrix = next(key for key in state if key.endswith(".matrix"))
    wrong = [
        {key: value for key, value in state.items() if key != matrix},
        state | {matrix: state[matrix][:, :1]},
        state | {matrix: state[matrix].half()},
        state | {"linear.position": torch.tensor(-1)},
        state | {"positions": torch.tensor([1, 2])},
    ]
    for broken in wrong:
        with pytest.raises(ValueError):
            stream._engine.load_state_dict(broken)
    assert torch.equal(stream.feed(ids[:, 20:]), before.feed(ids[:, 20:]))


@every_hybrid
def test_copies_questions_and_what_is_not_committed_leave_no_trace(name):
    ids, other = zoo.tokens(60), zoo.tokens(20, seed=9)
    stream, alone = opened(name), opened(name)
    for one in (stream, alone):
        one.feed(ids[:, :30])
    asked = stream.feed(other, commit=False)
    assert torch.equal(stream.fork().feed(other), asked)
    assert torch.equal(stream.question().feed(other), asked)
    assert len(list(stream.question(other[0, :3]).generate(other[0, :3].tolist(), max_tokens=3))) == 3
    assert torch.equal(stream.feed(ids[:, 30:]), alone.feed(ids[:, 30:]))


@every_hybrid
def test_a_question_that_retrieves_goes_through_both_kinds_of_layers(name):
    ids = zoo.tokens(60)
    stream = opened(
        name, "live-vlm(cache_size=12, recent_frames=4, clip_frames=4, frame=1, prompt=2, page=2, observe=2)"
    )
    alone = stream.fork()
    for one in (stream, alone):
        one.feed(ids[:, :30])
    answer = stream.question(ids[0, 30:34]).feed(ids[:, 30:34])
    assert torch.equal(answer, alone.question(ids[0, 30:34]).feed(ids[:, 30:34]))
    assert torch.equal(stream.feed(ids[:, 40:]), alone.feed(ids[:, 40:]))


@every_hybrid
def test_reset_and_reorder(name):
    ids, model = zoo.tokens(30, 3), doubled(name)
    stream, fresh = (opened(name, batch=3, model=model) for _ in range(2))
    stream.feed(ids)
    with pytest.raises(ValueError, match="reset without keep_sink"):
        stream.reset(keep_sink=True)
    before = stream.fork()
    stream._engine.reorder(torch.tensor([2, 0, 0]))
    with wide():  # places in a batch change how products are rounded
        want = before.feed(ids[:, :5])[[2, 0, 0]]
        assert oracles.relative_error(stream.feed(ids[[2, 0, 0], :5]), want) <= 1e-10
    stream.reset()
    assert stream.position == 0
    assert torch.equal(stream.feed(ids), fresh.feed(ids))


@every_hybrid
def test_rows_are_independent_and_padding_is_refused(name):
    ids = zoo.tokens(20, 2)
    stream = opened(name, batch=2)
    got = stream.feed(ids)
    torch.testing.assert_close(got[1:], opened(name).feed(ids[1:]), rtol=1e-4, atol=1e-4)
    mask = torch.ones(2, 20, dtype=torch.bool)
    mask[0, :3] = False
    before = stream.fork()
    with pytest.raises(ValueError, match="feed rows of equal length"):
        stream.feed(ids, mask)
    assert torch.equal(stream.feed(ids), before.feed(ids))


@every_hybrid
def test_bytes_do_not_grow(name):
    ids, held = zoo.tokens(110), []
    stream = opened(name)
    for token in ids.split(1, 1):
        stream.feed(token)
        held.append(stream.nbytes)
    assert max(held[70:]) == max(held[30:70])
    assert stream.nbytes > stream.state.nbytes  # matrices, marks and inputs are counted
    assert opened(name, undo=0).nbytes == opened(name).nbytes


@every_hybrid
def test_an_interrupted_step_leaves_both_as_they_were(name):
    model, ids = zoo.fresh(name), zoo.tokens(20)
    stream = opened(name, model=model)
    stream.feed(ids[:, :10])
    before = stream.fork()
    layer = stream._engine.decoder.tower.get_submodule("model.layers.3.mlp")
    hook = layer.register_forward_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with pytest.raises(RuntimeError, match="stop"):
        stream.feed(ids[:, 10:])
    hook.remove()
    assert torch.equal(stream.feed(ids[:, 10:]), before.feed(ids[:, 10:]))


def test_places_on_three_axes_go_with_matrices():
    """Qwen3.5 turns by three axes, interleaved, beside its matrix layers."""
    model, ids = doubled("qwen3.5"), zoo.tokens(40)
    places = torch.randint(0, 50, (1, 40, 3), generator=torch.Generator().manual_seed(0))
    with wide(), torch.no_grad():
        want = model(input_ids=ids, position_ids=places.permute(2, 0, 1)).logits
        stream = opened("qwen3.5", "full", model=model)
        got = [stream.feed(ids[:, a : a + 7], tags={"coordinates": places[:, a : a + 7]}) for a in range(0, 40, 7)]
    assert oracles.relative_error(torch.cat(got, 1), want) <= 1e-10


@pytest.mark.parametrize("undo", [-1, 1.5, True])
def test_a_wrong_undo_is_refused(undo):
    with pytest.raises(ValueError, match="undo is"):
        opened("qwen3-next", undo=undo)
