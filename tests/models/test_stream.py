"""What a stream promises: pieces equal the whole, rows are independent, copies are exact, errors change nothing."""

import copy
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import evenflow as ef
from evenflow.memory import Memory, StateError, read_state, write_state
from evenflow.models import Stream
from evenflow.models.stream import CHUNK

from . import zoo

SPECS = {
    "streaming-llm": "streaming-llm(sink=3, window=8)",
    "window": "window(window=9)",
    "full": "full",
    "zero-sink": "zero-sink(window=9)",
    "recompute": "recompute(window=6, sink=2)",
}
every_memory = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS)


def opened(spec: str = SPECS["streaming-llm"], name: str = "llama", **options) -> Stream:
    return ef.open(zoo.shared(name), spec, **options)


def near(one: Tensor, other: Tensor, limit: float = 1e-5) -> None:
    torch.testing.assert_close(one.double(), other.double(), rtol=0, atol=limit * max(1.0, float(other.abs().max())))


def unchanged(stream: Stream, before: Stream) -> None:
    """`stream` is still where `before`, its earlier fork, is: same position, and the same future to the last bit."""
    assert torch.equal(stream.positions, before.positions)
    assert torch.equal(stream.last_logits, before.last_logits)
    ids = zoo.tokens(12, stream.batch, seed=5) % 40 + 3
    assert torch.equal(stream.fork().feed(ids), before.fork().feed(ids))


# -- reading -------------------------------------------------------------------------------------------------------


@every_memory
@given(cuts=st.lists(st.integers(1, 30), min_size=1, max_size=8), length=st.integers(1, 45))
@settings(max_examples=12, deadline=None)
def test_feeding_in_pieces_is_feeding_at_once(spec, cuts, length):
    ids = zoo.tokens(length)
    whole, pieces = opened(spec), opened(spec)
    expected, got, column = whole.feed(ids), [], 0
    while column < length:
        size = cuts[len(got) % len(cuts)]
        got.append(pieces.feed(ids[:, column : column + size]))
        column += size
    near(torch.cat(got, 1), expected)
    assert pieces.position == whole.position == length


def test_a_long_feed_is_read_in_chunks_without_a_seam():
    ids = zoo.tokens(2 * CHUNK + 37)
    one, other = opened(), opened()
    near(one.feed(ids), torch.cat([other.feed(piece) for piece in ids.split(100, 1)], 1))


def test_ids_may_be_lists_and_tensors_of_any_integer_type():
    ids = zoo.tokens(7)
    expected = opened().feed(ids)
    for same in (
        ids[0].tolist(),
        ids.tolist(),
        ids[0],
        ids.int(),
        ids.to(torch.uint8),
        ids[0].numpy(),
        tuple(ids[0].tolist()),
    ):
        assert torch.equal(opened().feed(same), expected)
    assert expected.shape == (1, 7, zoo.VOCABULARY)
    expected.sub_(1).requires_grad_()  # an ordinary tensor, not bound to inference mode


@every_memory
@given(data=st.data())
@settings(max_examples=10, deadline=None)
def test_rows_with_padding_anywhere_are_rows_alone(spec, data):
    """Three rows advance by different counts, with holes wherever; each is what it would be on its own."""
    together, alone = opened(spec, batch=3), [opened(spec) for _ in range(3)]
    for number in range(data.draw(st.integers(1, 4))):
        m = data.draw(st.integers(1, 9))
        ids = zoo.tokens(m, 3, seed=number)
        bits = st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=3, max_size=3)
        mask = torch.tensor(data.draw(bits.filter(lambda rows: any(map(any, rows)))))
        logits = together.feed(ids.masked_fill(~mask, -100), mask)
        assert not bool(logits[~mask].any())
        for row, single in enumerate(alone):
            if bool(mask[row].any()):
                near(logits[row, mask[row]], single.feed(ids[row, mask[row]])[0])
    assert together.positions.tolist() == [single.positions[0] for single in alone]
    ready = [row for row, single in enumerate(alone) if single._last is not None]
    for row in ready:
        near(together.last_logits[row], alone[row].last_logits[0])


@pytest.mark.parametrize("name", ["gemma2", "gemma3", "falcon-alibi", "mpt", "gpt-neox", "gpt-oss", "mistral-sliding"])
def test_rows_of_different_age_in_every_kind_of_attention(name):
    """Sliding layers, ALiBi, soft caps, learned sinks: rows that started at different times, long past eviction."""
    together, alone = opened(name=name, batch=3), [opened(name=name) for _ in range(3)]
    for number, (m, starts) in enumerate(
        [(9, (0, 4, 8)), (1, (0, 0, 1)), (20, (3, 0, 11)), (1, (0, 0, 0)), (7, (0, 6, 2))]
    ):
        ids = zoo.tokens(m, 3, seed=number)
        mask = torch.arange(m) >= torch.tensor(starts)[:, None]
        logits = together.feed(ids, mask)
        for row, single in enumerate(alone):
            if bool(mask[row].any()):
                near(logits[row, mask[row]], single.feed(ids[row, mask[row]])[0])
    assert together.positions.tolist() == [35, 28, 16]


def test_a_whole_chunk_of_padding_reads_nothing():
    stream, ids = opened(batch=2), zoo.tokens(CHUNK + 5, 2)
    mask = torch.zeros(2, CHUNK + 5, dtype=torch.bool)
    mask[0, -2:] = mask[1, -1:] = True
    logits = stream.feed(ids, mask)
    near(logits[1, -1], opened().feed(ids[1, -1:])[0, -1])
    near(logits[0, -1], opened().feed(ids[0, -2:])[0, -1])
    assert stream.positions.tolist() == [2, 1]
    with pytest.raises(ValueError, match="different positions"):
        _ = stream.position


@every_memory
def test_surprisal_is_what_the_logits_said(spec):
    ids = zoo.tokens(30, 2)
    one, other = opened(spec, batch=2), opened(spec, batch=2)
    logits = one.feed(ids).float()
    expected = -logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    got = torch.cat([other.surprisal(piece) for piece in ids.split([1, 12, 17], 1)], 1)
    assert got.dtype == torch.float32 and bool(got[:, 0].isnan().all())
    near(got[:, 1:], expected)


@given(data=st.data())
@settings(max_examples=15, deadline=None)
def test_surprisal_of_ragged_rows_is_that_of_rows_alone(data):
    together, alone = opened(batch=2), [opened(), opened()]
    for number in range(3):
        m = data.draw(st.integers(1, 6))
        ids = zoo.tokens(m, 2, seed=number)
        mask = torch.tensor(
            data.draw(st.lists(st.lists(st.booleans(), min_size=m, max_size=m), min_size=2, max_size=2))
        )
        mask[0, 0] = True
        got = together.surprisal(ids, mask)
        assert bool(got[~mask].isnan().all())
        for row, single in enumerate(alone):
            if bool(mask[row].any()):
                expected = single.surprisal(ids[row, mask[row]])[0]
                torch.testing.assert_close(got[row, mask[row]], expected, rtol=1e-4, atol=1e-4, equal_nan=True)


def test_surprisal_across_chunks():
    ids = zoo.tokens(CHUNK + 50)
    got, logits = opened().surprisal(ids), opened().feed(ids)
    near(got[0, 1:], -logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0])


def test_recompute_is_the_model_run_afresh():
    model, ids = zoo.shared("llama"), zoo.tokens(30)
    got = opened(SPECS["recompute"]).feed(ids)[0]
    for t in range(30):
        seen = ids[:, : t + 1] if t < 8 else torch.cat([ids[:, :2], ids[:, t - 5 : t + 1]], 1)
        with torch.no_grad():
            near(got[t], model(input_ids=seen).logits[0, -1])


def test_recompute_serves_models_that_cannot_be_streamed():
    """It only runs the model, so even learned absolute positions are fine."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=zoo.VOCABULARY, n_positions=16)
    ).eval()
    stream, ids = ef.open(model, "recompute(window=10)"), zoo.tokens(40)
    logits = stream.feed(ids)
    with torch.no_grad():
        near(logits[0, -1], model(input_ids=ids[:, -10:]).logits[0, -1])
    assert stream.nbytes == 80 and stream.state is None


# -- bounded -------------------------------------------------------------------------------------------------------


def test_bytes_stay_flat():
    stream = opened()
    sizes = set()
    for piece in zoo.tokens(300).split(20, 1):
        stream.feed(piece)
        sizes.add(stream.nbytes)
    assert len(sizes) == 1
    full = opened("full")
    full.feed(zoo.tokens(600))
    assert full.nbytes > 10 * sizes.pop()


# -- copy, undo, forget, keep ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma3", "falcon-alibi", "gpt-oss"])
def test_saved_resumed_and_forked_streams_go_on_bit_for_bit(name, tmp_path):
    model = zoo.shared(name)
    stream = ef.open(model, SPECS["streaming-llm"], batch=2)
    stream.feed(zoo.tokens(50, 2), torch.arange(100).reshape(2, 50) % 7 != 3)
    stream.save(tmp_path / "a.state")
    resumed, forked = ef.resume(model, tmp_path / "a.state"), stream.fork()
    assert torch.equal(resumed.last_logits, stream.last_logits) and torch.equal(forked.last_logits, stream.last_logits)
    ids = zoo.tokens(1000, 2, seed=9)
    # Blocks and single tokens: a thousand logits, in which one wrong bit would show.
    sizes = [1] * 100 + [300, 300, 300]
    for piece in ids.split(sizes, 1):
        logits = stream.feed(piece)
        assert torch.equal(resumed.feed(piece), logits)
        assert torch.equal(forked.feed(piece), logits)


@every_memory
def test_every_memory_survives_save_and_resume(spec, tmp_path):
    stream, ids = opened(spec), zoo.tokens(40)
    stream.save(tmp_path / "empty")
    near(ef.resume(zoo.shared("llama"), tmp_path / "empty").feed(ids), stream.feed(ids), 0)
    stream.save(tmp_path / "a")
    resumed = ef.resume(zoo.shared("llama"), tmp_path / "a")
    assert resumed.memory == stream.memory and resumed.position == 40
    assert list(resumed.generate(max_tokens=5)) == list(stream.generate(max_tokens=5))


@every_memory
def test_what_happens_to_a_fork_is_not_seen_by_the_other(spec):
    stream, ids = opened(spec), zoo.tokens(60)
    stream.feed(ids[:, :20])
    fork, before = stream.fork(), stream.fork()
    fork.feed(ids[:, 20:50])
    unchanged(stream, before)
    near(stream.feed(ids[:, 50:]), (lambda s: (s.feed(ids[:, :20]), s.feed(ids[:, 50:]))[1])(opened(spec)))


def test_a_memory_of_ones_own_is_named_on_resume(tmp_path):
    model, memory = zoo.shared("llama"), Memory(sink=2, window=7, name="mine", params={"sink": 2, "window": 7})
    stream, ids = ef.open(model, memory), zoo.tokens(30)
    stream.feed(ids)
    stream.save(tmp_path / "a")
    with pytest.raises(ValueError, match="no recipe 'mine'"):
        ef.resume(model, tmp_path / "a")
    assert torch.equal(ef.resume(model, tmp_path / "a", memory=memory).feed(ids), stream.feed(ids))
    for other in ("full", Memory(sink=2, window=7, null="zero", name="mine", params={"sink": 2, "window": 7})):
        with pytest.raises(StateError, match="written with memory mine"):
            ef.resume(model, tmp_path / "a", memory=other)


def test_a_state_is_refused_by_another_model_and_when_it_is_damaged(tmp_path):
    path, model = tmp_path / "a", zoo.shared("llama")
    stream = ef.open(model, SPECS["streaming-llm"])
    stream.feed(zoo.tokens(20))
    stream.save(path)
    for other in (zoo.shared("llama-yarn"), zoo.shared("qwen2"), copy.deepcopy(model).bfloat16()):
        with pytest.raises(StateError, match="another model"):
            ef.resume(other, path)
    trained = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter.mul_(1.001)
    with pytest.raises(StateError, match="another model"):
        ef.resume(trained, path)
    assert ef.resume(copy.deepcopy(model), path).position == 20
    tensors, meta = read_state(path)
    for change, reason in [
        ({"format": 99}, "not a saved stream"), ({"batch": 2}, "does not fit"),
        ({"memory": "streaming-llm(sink=4, window=8)"}, "was written with memory"),
        ({"memory": "streaming-llm(sink=4, window=8)", "parts": {**meta["parts"], "sink": 4}}, "does not fit"),
    ]:  # fmt: skip
        write_state(tmp_path / "b", tensors, {**meta, **change})
        with pytest.raises(StateError, match=reason):
            ef.resume(model, tmp_path / "b")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(StateError, match="damaged"):
        ef.resume(model, path)
    with pytest.raises(StateError, match="cannot read"):
        ef.resume(model, tmp_path / "nowhere")


@every_memory
def test_truncate_undoes_exactly(spec):
    ids = zoo.tokens(9)
    stream, plain = opened(spec), opened(spec)
    stream.feed(ids[:, :5])
    stream.feed(ids[:, 5:7])
    stream.truncate(2)
    assert stream.position == 5
    with pytest.raises(ValueError, match="nothing to go on from"):
        stream.generate()
    plain.feed(ids[:, :5])
    near(stream.feed(ids[:, 5:]), plain.feed(ids[:, 5:]))
    with pytest.raises(ValueError, match="cannot undo"):
        stream.truncate(10)


@pytest.mark.parametrize("spec", [SPECS["streaming-llm"], SPECS["recompute"]])
def test_one_token_can_always_be_undone_and_more_is_refused_once_they_are_gone(spec):
    ids = zoo.tokens(41)
    stream, plain = opened(spec), opened(spec)
    for piece in ids[:, :40].split(1, 1):
        stream.feed(piece)
    plain.feed(ids[:, :39])
    before = stream.fork()
    with pytest.raises(ValueError, match="cannot undo 3 tokens"):
        stream.truncate(3)
    unchanged(stream, before)
    stream.truncate(0)
    stream.truncate(1)
    near(stream.feed(ids[:, 40:]), plain.feed(ids[:, 40:]))


@every_memory
def test_reset_forgets_and_may_keep_the_sink(spec):
    ids = zoo.tokens(50)
    stream, sink = opened(spec), opened(spec).memory.sink
    stream.feed(ids[:, :30])
    stream.reset(keep_sink=True)
    assert stream.position == sink
    plain = opened(spec)
    if sink:
        plain.feed(ids[:, :sink])
    near(stream.feed(ids[:, 30:]), plain.feed(ids[:, 30:]))
    stream.reset()
    assert stream.position == 0
    near(stream.feed(ids), opened(spec).feed(ids))


# -- many at once ----------------------------------------------------------------------------------------------------


def test_streams_over_one_model_do_not_meet():
    """Two memories, interleaved token by token, with the model's own forward in between."""
    model, ids = zoo.shared("llama"), zoo.tokens(40)
    one, other = opened(), opened("window(window=5)")
    want_one, want_other = opened().feed(ids), opened("window(window=5)").feed(ids)
    for t in range(40):
        near(one.feed(ids[:, t : t + 1])[0, 0], want_one[0, t])
        with torch.no_grad():
            model(input_ids=ids[:, : t + 1])
        near(other.feed(ids[:, t : t + 1])[0, 0], want_other[0, t])


def test_streams_in_threads_do_not_meet():
    model = zoo.shared("gemma3")
    specs = [SPECS["streaming-llm"], "window(window=5)", "full", "plain"]
    ids = [zoo.tokens(60, seed=seed) for seed in range(len(specs))]

    def run(spec: str, some: Tensor, size: int) -> Tensor:
        if spec == "plain":
            with torch.no_grad():
                return torch.cat([model(input_ids=some[:, : t + 1]).logits[:, -1:] for t in range(60)], 1)
        stream = ef.open(model, spec)
        return torch.cat([stream.feed(piece) for piece in some.split(size, 1)], 1)

    alone = [run(spec, some, 60) for spec, some in zip(specs, ids, strict=True)]
    together: list[Tensor | None] = [None] * len(specs)
    barrier = threading.Barrier(len(specs))

    def work(number: int) -> None:
        barrier.wait()
        together[number] = run(specs[number], ids[number], 1)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(len(specs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for got, expected in zip(together, alone, strict=True):
        assert got is not None
        near(got, expected)


# -- bad input -------------------------------------------------------------------------------------------------------

BAD = {
    "empty": (lambda: ([],), ValueError, "no ids"),
    "empty tensor": (lambda: (torch.empty(2, 0, dtype=torch.long),), ValueError, "no ids"),
    "text": (lambda: ("hello",), TypeError, "not text"),
    "floats": (lambda: (torch.rand(2, 3),), TypeError, "whole numbers"),
    "booleans": (lambda: (torch.ones(2, 3, dtype=torch.bool),), TypeError, "whole numbers"),
    "ragged list": (lambda: ([[1, 2], [3]],), TypeError, "cannot be read as integers"),
    "objects": (lambda: ([object()],), TypeError, "cannot be read as integers"),
    "one row of two": (lambda: ([1, 2, 3],), ValueError, r"expected \[2, T\]"),
    "three rows": (lambda: (torch.ones(3, 2, dtype=torch.long),), ValueError, r"expected \[2, T\]"),
    "three dimensions": (lambda: (torch.ones(1, 2, 3, dtype=torch.long),), ValueError, r"expected \[2, T\]"),
    "too large": (lambda: (torch.full((2, 3), zoo.VOCABULARY),), ValueError, "id 67 is out of range"),
    "negative": (lambda: (torch.tensor([[1, 2], [3, -1]]),), ValueError, "id -1 is out of range"),
    "mask of another shape": (lambda: (torch.ones(2, 3, dtype=torch.long), torch.ones(2, 4)), ValueError, "mask has shape"),
    "mask of nothing": (lambda: (torch.ones(2, 3, dtype=torch.long), torch.zeros(2, 3)), ValueError, "leaves no token"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
@pytest.mark.parametrize("spec", [SPECS["streaming-llm"], SPECS["recompute"]])
def test_bad_input_is_refused_and_changes_nothing(case, spec):
    make, error, message = BAD[case]
    stream, plain, ids = opened(spec, batch=2), opened(spec, batch=2), zoo.tokens(20, 2)
    plain.feed(ids[:, :12])
    stream.feed(ids[:, :12])
    before = stream.fork()
    with pytest.raises(error, match=message):
        stream.feed(*make())
    with pytest.raises(error, match=message):
        stream.surprisal(*make())
    unchanged(stream, before)
    near(stream.feed(ids[:, 12:]), plain.feed(ids[:, 12:]))


@pytest.mark.parametrize("spec", [SPECS["streaming-llm"], SPECS["recompute"]])
def test_weights_that_are_no_numbers_are_found_when_they_are_used(spec):
    """NaN in one embedding row: only a feed that reads that token can know. It is refused whole, and nothing is lost."""
    model = zoo.fresh("llama")
    with torch.no_grad():
        model.get_input_embeddings().weight[50] = torch.nan
    stream, plain, good = ef.open(model, spec), opened(spec), zoo.tokens(20)
    good[good == 50] = 51
    stream.feed(good)
    plain.feed(good)
    before = stream.fork()
    for bad in ([50], [3, 4, 50, 5], [3] * CHUNK + [50]):
        with pytest.raises(ValueError, match=r"not numbers|NaN"):
            stream.feed(bad)
        unchanged(stream, before)
    near(stream.feed(good), plain.feed(good))


def test_an_interrupted_feed_changes_nothing():
    class Interrupted(KeyboardInterrupt):
        pass

    stream, ids = opened(), zoo.tokens(3 * CHUNK)
    stream.feed(ids[:, :30])
    before, real, calls = stream.fork(), stream._engine.decoder.twin.forward, []

    def forward(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise Interrupted
        return real(*args, **kwargs)

    twin = stream._engine.decoder.twin
    twin.forward = forward
    try:
        with pytest.raises(Interrupted):
            stream.feed(ids)
    finally:
        del twin.forward
    assert len(calls) == 3
    unchanged(stream, before)


def test_an_interruption_between_chunks_takes_them_back_at_once(monkeypatch):
    stream, ids = opened(), zoo.tokens(3 * CHUNK)
    stream.feed(ids[:, :30])
    before, real, calls = stream.fork(), Tensor.logsumexp, []

    def logsumexp(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(Tensor, "logsumexp", logsumexp)
    with pytest.raises(KeyboardInterrupt) as held:  # whose traceback keeps every frame alive
        stream.surprisal(ids)
    monkeypatch.undo()
    assert held.traceback and len(calls) == 2
    unchanged(stream, before)


@pytest.mark.parametrize("batch", [0, -1, 1.5, True])
def test_batch_is_a_whole_number_of_rows(batch):
    with pytest.raises(ValueError, match="batch is"):
        opened(batch=batch)


def test_memory_is_a_spec_or_a_memory():
    with pytest.raises(ValueError, match="did you mean 'streaming-llm'"):
        opened("streaming_lm")
    with pytest.raises(TypeError, match="expected a spec"):
        opened(12)
    assert opened(Memory(window=5)).memory.window == 5


def test_a_stream_opened_without_a_batch_takes_the_rows_of_its_first_feed():
    ids = zoo.tokens(20, 3)
    stream, fixed = opened(), opened(batch=3)
    near(stream.feed(ids), fixed.feed(ids), 0)
    assert stream.batch == 3
    with pytest.raises(ValueError, match=r"3 row\(s\)"):
        stream.feed(ids[0])
    with pytest.raises(ValueError, match="1 row"):
        opened(batch=1).feed(ids)
    fresh = opened()
    with pytest.raises(ValueError, match="out of range"):
        fresh.feed([[1, 2], [3, 10**6]])
    assert fresh.batch == 1
    assert len(next(fresh.generate([[1, 2, 3], [4, 5]], max_tokens=1))) == 2
