"""What must hold for the retrieving memory of ReKV (arXiv 2503.00540): how it reads, what it stores, how it answers."""

import os
import signal
import subprocess
import sys
import threading
import warnings
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import evenflow as ef
from evenflow.memory.store import Store, StoreWarning
from evenflow.recipes.reference import Call, rekv, rotated

from .drive import asked, play, random_calls, worst

ROPE = ef.Rope()
PROMPT, LOCAL, FRAME, SIZE = 3, 10, 4, 3
SMALL = {
    "n_init": PROMPT,
    "n_local": LOCAL,
    "frame": FRAME,
    "retrieve_size": SIZE,
    "ram_bytes": 1 << 22,
    "device_bytes": 0,
}
SIZES = [PROMPT, 4, 8, 1, 3, 2, 21, 4, 1]  # short of the window, over it in one step, then far beyond
BLOCK = 2 * 2 * FRAME * 12 * 8  # bytes of a block in one layer: keys and values of two heads, float64


def build(batch=1, *, kv_heads=2, dtype=torch.float64, rope=ROPE, **params):
    memory = ef.recipe("rekv", **{**SMALL, **params})
    return memory.build(layers=2, heads=4, kv_heads=kv_heads, head_dim=12, rope=rope, batch=batch, dtype=dtype)


def fed(state, calls):
    """The memory after these calls."""
    play(state, calls)
    return state


def part(calls, start, stop):
    return [layer[start:stop] for layer in calls]


def whole(calls):
    """All that each layer has read: k, v [H_kv, n, D]."""
    return [tuple(torch.cat([getattr(c, n) for c in layer if c.commit], 1) for n in "kv") for layer in calls]


def expected(calls, ask, **params):
    """Answers by the reference, in the order of `asked`: what is read, what each layer retrieves."""
    given = {"n_init": PROMPT, "n_local": LOCAL, "block": FRAME, "size": SIZE, "chunk": 1, **params}
    seen, question, later = rekv.ask(whole(calls), [layer[0] for layer in ask], part(ask, 1, None), ROPE, **given)
    return [[one, *more] for one, more in zip(question, later, strict=True)], seen


def answered(source, ask):
    return asked(source, [layer[0] for layer in ask], part(ask, 1, None))


@pytest.mark.parametrize(("params", "kv_heads"), [
    ({}, 1), ({}, 2), ({}, 4), ({"n_init": 0}, 2), ({"n_init": 9}, 2), ({"n_local": 4}, 2), ({"n_local": 30, "n_init": 14}, 4),
])  # fmt: skip
def test_any_calls_equal_the_reference(params, kv_heads):
    calls = random_calls(SIZES, tentative=1, kv_heads=kv_heads)
    given = {"n_init": PROMPT, "n_local": LOCAL, **params}
    theirs = rekv.reference(calls, ROPE, frame=FRAME, **given)
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10


@pytest.mark.parametrize("cut", [2, 7, 60])
def test_any_cut_reads_stores_and_answers_the_same(cut):
    calls, ask = random_calls([1] * 60), random_calls([4, 3, 1], seed=5)
    pieces = [
        [
            Call(*(torch.cat([getattr(c, n) for c in layer[at : at + cut]], 1) for n in "qkv"))
            for at in range(0, 60, cut)
        ]
        for layer in calls
    ]
    one, state = build(), build()
    once = [torch.cat(layer, 1) for layer in play(one, calls)]
    ours = [torch.cat(layer, 1) for layer in play(state, pieces)]
    assert worst([ours], [once]) < 1e-12
    assert worst(answered(state, ask)[0], answered(one, ask)[0]) < 1e-12
    assert len(state.store) == len(one.store) == 2 * ((60 - PROMPT) // FRAME)


@pytest.mark.parametrize(("params", "sizes", "kv_heads"), [
    ({}, [2], 2), ({}, [PROMPT], 2), ({}, [PROMPT, 4, 1], 2), ({}, SIZES, 1), ({}, SIZES, 2), ({}, SIZES, 4),
    ({"n_init": 0}, SIZES, 2), ({"retrieve_size": 5, "chunk_size": 2}, SIZES, 4), ({"n_local": 60}, SIZES, 2),
])  # fmt: skip
def test_questions_and_answers_equal_the_reference(params, sizes, kv_heads):
    """Also those that are longer than the window, which then slides over what was retrieved."""
    calls = random_calls(sizes, kv_heads=kv_heads)
    ask = random_calls([4, 3, 9, 1], seed=5, kv_heads=kv_heads)
    names = {"retrieve_size": "size", "chunk_size": "chunk"}
    theirs, index = expected(calls, ask, **{names.get(name, name): value for name, value in params.items()})
    ours, seen = answered(fed(build(kv_heads=kv_heads, **params), calls), ask)
    assert seen == index
    assert worst(ours, theirs) < 1e-10


def full():
    memory = ef.recipe("window", window=1000)
    return memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)


def test_point_1_a_window_as_long_as_the_stream_is_causal_attention():
    calls = random_calls(SIZES)
    assert worst(play(build(n_local=sum(SIZES)), calls), play(full(), calls)) < 1e-12
    tight = play(build(n_local=sum(SIZES) - 1), calls)
    assert worst(part(tight, 0, -1), play(full(), part(calls, 0, -1))) < 1e-12
    assert worst(tight, play(full(), calls)) > 1e-3


def test_point_2_a_question_to_all_frames_of_the_window_is_full_attention():
    calls, ask = random_calls([PROMPT, 8, 8, 3]), random_calls([4], seed=5)
    every = fed(full(), calls)
    state = fed(build(n_local=40, retrieve_size=5), calls)
    ours, seen = answered(state, ask)
    assert seen == [[*range(22)]] * 2 and worst(ours, play(every, ask)) < 1e-10
    assert worst(answered(fed(build(n_local=40, retrieve_size=4), calls), ask)[0], play(every, ask)) > 1e-3


@pytest.mark.parametrize("time", [LOCAL, LOCAL + 1, 137, 1000])
@pytest.mark.parametrize("together", [1, 4])
def test_point_3_a_sink_is_met_at_the_last_place_of_the_window_at_any_time(time, together):
    """Its share over that of the token itself tells its logit, whatever else there is."""
    made = torch.Generator().manual_seed(0)
    sinks = torch.randn(4, PROMPT, 12, generator=made, dtype=torch.float64)
    q, k = torch.randn(2, 4, together, 12, generator=made, dtype=torch.float64)
    state = build(kv_heads=4)
    values = torch.eye(PROMPT, 12, dtype=torch.float64).expand(4, -1, -1)
    play(state, [[Call(sinks, sinks, values)]] * 2)
    step = 100 if time > 100 else 1
    for size in [1] * ((time - PROMPT) % step) + [step] * ((time - PROMPT) // step):
        play(state, [[Call(*(torch.zeros(4, size, 12, dtype=torch.float64),) * 3)]] * 2)
    own = torch.zeros(4, together, 12, dtype=torch.float64)
    own[:, range(together), range(6, 6 + together)] = 1
    out = play(state, [[Call(q, k, own)]] * 2)[1][0]
    for n in range(together):
        far, near = rotated(q[:, n : n + 1], [LOCAL - 1], ROPE)[:, 0], q[:, n]
        shares = out[:, n, :PROMPT] / out[:, n, 6 + n, None]
        logits = (sinks @ far[..., None])[..., 0] - (k[:, n] * near).sum(-1, keepdim=True)
        torch.testing.assert_close(shares.log(), logits * 12**-0.5, rtol=0, atol=1e-11)


@pytest.mark.parametrize("cut", [1, 5])
def test_point_4_a_token_older_than_the_window_has_no_weight_unless_it_is_a_sink(cut):
    calls, old = random_calls([cut] * 40), 20
    changed = [[replace(c, v=c.v.clone()) for c in layer] for layer in calls]
    sink = [[replace(c, v=c.v.clone()) for c in layer] for layer in calls]
    for layer in range(2):
        changed[layer][old // cut].v[:, old % cut] += 1
        sink[layer][0].v[:, 0] += 1
    once, other, third = (torch.cat(play(build(), c)[1], 1) for c in (calls, changed, sink))
    differs = (once != other).any(-1).any(0).nonzero()[:, 0].tolist()
    assert differs == [*range(old, old + LOCAL)]
    assert bool((once != third).any(-1).any(0).all())


def test_point_5_every_frame_is_a_block_bit_by_bit_in_host_memory_and_the_device_is_flat():
    state, sizes = build(), {}
    stream = [random_calls([PROMPT]), *(random_calls([FRAME], seed=n) for n in range(1, 26))]
    for n, calls in enumerate(stream):
        play(state, calls)
        sizes[n] = state.nbytes
        assert len(state.store) == 2 * n
        assert state.store.levels.ram == 2 * n * BLOCK + state.store.levels.index
    assert sizes[25] == sizes[5]  # ten times the window, and twice
    assert state.store.nbytes == 0
    for layer in range(2):
        index = state.store.index(layer)
        assert index.first.tolist() == [PROMPT + FRAME * n for n in range(25)]
        brought = state.store.fetch(layer, index.ids)
        for n, (k, v) in enumerate(zip(brought.keys, brought.values, strict=True), 1):
            assert torch.equal(k, stream[n][layer][0].k) and torch.equal(v, stream[n][layer][0].v)
            assert torch.equal(index.tensors["mean"][n - 1], k.mean(1).flatten())


def test_point_6_what_is_retrieved_is_in_order_also_among_equals():
    calls, ask = random_calls(SIZES), random_calls([4], seed=5)
    for seen in answered(fed(build(), calls), ask)[1]:
        assert seen == sorted(seen) and len(seen) == PROMPT + SIZE * FRAME
    same = [[replace(c, k=torch.ones_like(c.k)) for c in layer] for layer in calls]
    state = fed(build(), same)
    assert answered(state, ask)[1] == [[*range(PROMPT + SIZE * FRAME)]] * 2
    assert answered(fed(build(retrieve_size=1000), calls), ask)[1] == [[*range(sum(SIZES))]] * 2


@pytest.mark.parametrize("planted", [0, 7, 24, 25])
def test_point_7_a_planted_frame_is_retrieved_in_every_layer(planted):
    """The last of these 25 frames and a half is not complete yet."""
    made = torch.Generator().manual_seed(planted)
    sizes = [PROMPT, *[FRAME] * 25, 2]
    calls, ask = random_calls(sizes, seed=planted), random_calls([4], seed=5)
    for layer, question in zip(calls, ask, strict=True):
        direction = torch.nn.functional.normalize(torch.randn(4, 12, generator=made, dtype=torch.float64), dim=-1)
        question[0].q[:] = question[0].q + 3 * direction[:, None]
        layer[1 + planted].k[:] += 3 * direction.reshape(2, 2, 12).sum(1)[:, None]
    seen = answered(fed(build(retrieve_size=1), calls), ask)[1]
    first = PROMPT + planted * FRAME
    assert seen == [[*range(PROMPT), *range(first, first + sizes[1 + planted])]] * 2


def test_point_8_questions_leave_the_stream_as_it_was_and_are_answered_alike():
    calls, ask = random_calls([PROMPT, *[FRAME] * 20]), random_calls([4, 3, 1], seed=5)
    state, alone = build(), build()
    play(state, part(calls, 0, 12))
    before = state.state_dict()
    first, second = answered(state, ask), answered(state, ask)
    assert worst(first[0], second[0]) == 0 and first[1] == second[1]
    after = state.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    play(alone, part(calls, 0, 12))
    assert worst(play(state, part(calls, 12, 21)), play(alone, part(calls, 12, 21))) == 0
    assert worst(answered(state, ask)[0], answered(alone, ask)[0]) == 0


class Work(TorchDispatchMode):
    """Counts the numbers that all operations read and make."""

    def __init__(self):
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        if not operation.is_view:
            self.numbers += sum(x.numel() for x in tree_leaves((args, kwargs, out)) if isinstance(x, torch.Tensor))
        return out


def test_point_9_a_frame_costs_the_same_at_any_age_and_a_question_one_product_a_layer():
    state, read, told = build(retrieve_size=1), {}, {}
    for n in range(41):
        with Work() as reading:
            play(state, random_calls([FRAME if n else PROMPT], seed=n))
        with Work() as asking:
            answered(state, random_calls([4], seed=5))
        read[n], told[n] = reading.numbers, asking.numbers
    assert read[10] == read[25] == read[40]
    growth = {(told[n + 1] - told[n]) / 2 for n in range(20, 40)}
    assert max(growth) < 2 * (2 * 12) + 32  # a mean key of 2 · 12 numbers is read, and one more score is sorted


# -- where blocks are, and what becomes of them ----------------------------------------------------------------------


@pytest.mark.parametrize("places", [
    {"ram_bytes": 4 * BLOCK, "disk": True}, {"ram_bytes": 0, "disk": True},
    {"ram_bytes": 0, "disk": True, "device_bytes": 3 * BLOCK}, {"ram_bytes": 10 * BLOCK, "disk": True, "device_bytes": 10**6},
])  # fmt: skip
def test_answers_do_not_depend_on_where_blocks_are(tmp_path, places):
    calls = random_calls([PROMPT, *[FRAME] * 20])
    there = fed(build(**{**places, "disk": str(tmp_path)}), calls)
    here = fed(build(), calls)
    assert there.store.levels.disk > 10 * BLOCK and here.store.levels.disk == 0
    device = there.nbytes
    for seed in (5, 6, 5):
        ask = random_calls([4, 1], seed=seed)
        ours, theirs = answered(there, ask), answered(here, ask)
        assert ours[1] == theirs[1] and worst(ours[0], theirs[0]) == 0
        assert 0 <= there.nbytes - device <= places.get("device_bytes", 0)


def test_without_a_disk_the_oldest_frames_are_lost_and_questions_go_on():
    calls, ask = random_calls([PROMPT, *[FRAME] * 20]), random_calls([4], seed=5)
    state = build(ram_bytes=16 * BLOCK, retrieve_size=20)
    with pytest.warns(StoreWarning, match="no disk"):
        play(state, calls)
    known = [state.store.index(layer).first.tolist() for layer in range(2)]
    assert all(firsts == [PROMPT + FRAME * n for n in range(20 - len(firsts), 20)] for firsts in known)
    assert 12 <= sum(map(len, known)) <= 16
    for seen, firsts in zip(answered(state, ask)[1], known, strict=True):
        assert seen == [*range(PROMPT), *range(firsts[0], PROMPT + FRAME * 20)]


def test_a_frame_that_cannot_be_read_is_missing_and_said(tmp_path):
    calls, ask = random_calls([PROMPT, *[FRAME] * 6]), random_calls([4], seed=5)
    state = fed(build(ram_bytes=0, disk=str(tmp_path), retrieve_size=10), calls)
    (file,) = state.store.path.glob("*.blocks")
    data = bytearray(file.read_bytes())
    data[len(data) // 24] ^= 1  # in the first frame of the first layer
    file.write_bytes(data)
    with pytest.warns(StoreWarning, match="stream goes on"):
        seen = answered(state, ask)[1]
    every = [*range(PROMPT + FRAME * 6)]
    assert seen == [[*range(PROMPT), *range(PROMPT + FRAME, PROMPT + FRAME * 6)], every]
    play(state, random_calls([FRAME], seed=9))
    assert [len(s) for s in answered(state, ask)[1]] == [len(every), len(every) + FRAME]


WRITER = """
import sys
from pathlib import Path
import torch
from evenflow.memory import write_state
from tests.recipes.test_card_rekv import BLOCK, FRAME, PROMPT, build, play, random_calls

torch.set_num_threads(1)
state = build(ram_bytes=6 * BLOCK, disk=sys.argv[1])
play(state, random_calls([PROMPT]))
for n in range(1, 10_000):
    play(state, random_calls([FRAME], seed=n))
    if n == 9:
        write_state(Path(sys.argv[1]) / "saved", state.state_dict(), {})
    print(n, flush=True)
"""


def test_a_kill_loses_no_frame_that_was_on_disk_and_a_saved_stream_answers_as_before(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) == 30:
            os.kill(process.pid, signal.SIGKILL)
            break
    process.wait()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", StoreWarning)  # of a torn end, if it was hit
        found = Store.recover(tmp_path / "store-0000", ram_bytes=0, index="ram")
    for layer in range(2):
        ids = found.index(layer).ids
        assert len(ids) >= 30 - 6  # at most 6 of both layers were in RAM only
        for n, keys in enumerate(found.fetch(layer, ids).keys, 1):
            assert torch.equal(keys, random_calls([FRAME], seed=n)[layer][0].k)
    assert found.nbytes == 0
    found.close()

    state, _ = ef.memory.read_state(tmp_path / "saved")
    again, unbroken = build(ram_bytes=6 * BLOCK, disk=str(tmp_path)), build()
    again.load_state_dict(state)
    for n in range(10):
        play(unbroken, random_calls([FRAME] if n else [PROMPT], seed=n))
    for n in (10, 11):
        ask = random_calls([4, 1], seed=n)
        ours, theirs = answered(again, ask), answered(unbroken, ask)
        assert ours[1] == theirs[1] and worst(ours[0], theirs[0]) == 0
        assert worst(*(play(s, random_calls([FRAME], seed=n)) for s in (again, unbroken))) == 0


# -- operations of a session -------------------------------------------------------------------------------------------


def test_forks_and_copies_remember_what_they_read_and_go_on_alone(tmp_path):
    calls = random_calls([PROMPT, *[FRAME] * 12, 2])
    state = fed(build(ram_bytes=6 * BLOCK, disk=str(tmp_path)), calls)
    folders = sorted(tmp_path.iterdir())
    twin = state.fork()
    answered(state, random_calls([4, 1], seed=5))
    assert sorted(tmp_path.iterdir()) == folders  # neither a question nor a fork that writes nothing needs a folder
    other = random_calls([FRAME] * 8, seed=3)
    play(twin, other)
    ask = random_calls([4, 1], seed=5)
    for memory, script in ((state, calls), (twin, [a + b for a, b in zip(calls, other, strict=True)])):
        theirs, index = expected(script, ask)
        ours, seen = answered(memory, ask)
        assert seen == index and worst(ours, theirs) < 1e-10
    state.reset()
    assert answered(state, ask)[1] == [[], []]
    play(state, calls)
    assert worst(answered(state, ask)[0], expected(calls, ask)[0]) < 1e-10


def test_rows_of_different_age_store_and_answer_for_themselves():
    scripts = [random_calls([2] * 30, seed=seed) for seed in (0, 1)]
    ask = [random_calls([4, 1], seed=seed) for seed in (5, 6)]
    state = build(batch=2)
    for step in range(30):
        mask = torch.tensor([[True] * 2, [step % 3 != 1] * 2])
        with state.step(2, mask=mask):
            for layer in range(2):
                state.attend(layer, *(torch.stack([getattr(s[layer][step], n) for s in scripts]) for n in "qkv"))
    read = [range(30), [n for n in range(30) if n % 3 != 1]]
    for order in ([0, 1], [1, 0]):
        question = state.question()
        outs = []
        for call in range(2):
            opened = question.step(1) if call else question.retrieve(4)
            with opened:
                for layer in range(2):
                    tensors = (torch.stack([getattr(ask[row][layer][call], n) for row in order]) for n in "qkv")
                    outs.append(question.attend(layer, *tensors))
        for place, row in enumerate(order):
            alone = fed(build(), [[layer[n] for n in read[row]] for layer in scripts[row]])
            theirs, seen = answered(alone, ask[row])
            assert [question.held(layer, place)[: len(s)] for layer, s in enumerate(seen)] == seen
            ours = [[outs[layer][place], outs[2 + layer][place]] for layer in range(2)]
            assert worst(ours, theirs) < 1e-10
        state.reorder(torch.tensor([1, 0]))


def test_questions_of_different_length_are_padded():
    calls, short, long = random_calls([PROMPT, *[FRAME] * 12]), random_calls([3], seed=5), random_calls([5], seed=6)
    both = build(batch=2)
    for n in range(13):
        with both.step(calls[0][n].q.shape[1]):
            for layer in range(2):
                both.attend(layer, *(getattr(calls[layer][n], name).expand(2, -1, -1, -1) for name in "qkv"))
    question = both.question()
    mask = torch.tensor([[False] * 2 + [True] * 3, [True] * 5])
    with question.retrieve(5, mask=mask):
        for layer in range(2):
            padded = (
                torch.stack([torch.nn.functional.pad(getattr(short[layer][0], n), (0, 0, 2, 0), value=100.0),
                             getattr(long[layer][0], n)]) for n in "qkv"
            )  # fmt: skip
            question.attend(layer, *padded)
    for row, ask in enumerate((short, long)):
        assert [question.held(layer, row) for layer in range(2)] == expected(calls, ask)[1]


def test_questions_are_answered_in_other_threads_while_the_stream_goes_on(tmp_path):
    calls = random_calls([PROMPT, *[FRAME] * 40])
    state = build(ram_bytes=10 * BLOCK, disk=str(tmp_path), device_bytes=6 * BLOCK)
    opened, answers, errors = [], {}, []
    ready = threading.Condition()

    def answering():
        try:
            while True:
                with ready:
                    ready.wait_for(lambda: opened)
                    n, question = opened.pop(0)
                if question is None:
                    return
                answers[n] = answered(question, random_calls([4, 1, 1], seed=n))
        except Exception as error:
            errors.append(error)

    readers = [threading.Thread(target=answering) for _ in range(2)]
    for reader in readers:
        reader.start()
    for n in range(41):
        play(state, part(calls, n, n + 1))
        if n % 5 == 0:
            with ready:
                opened.append((n, state.question()))
                ready.notify()
    with ready:
        opened += [(0, None)] * 2
        ready.notify_all()
    for reader in readers:
        reader.join()
    assert not errors and len(answers) == 9
    for n, (ours, seen) in answers.items():
        theirs, index = expected(part(calls, 0, n + 1), random_calls([4, 1, 1], seed=n))
        assert seen == index and worst(ours, theirs) < 1e-10


def test_a_question_may_select_anew_until_it_is_answered_and_be_copied_then():
    calls, ask = random_calls([PROMPT, *[FRAME] * 12, 2]), random_calls([4, 3, 1, 2, 1], seed=5)
    question = fed(build(), calls).question()
    with question.retrieve(3):
        for layer, one in enumerate(random_calls([3], seed=8)):
            question.attend(layer, *(x[None] for x in (one[0].q, one[0].k, one[0].v)))
    asked(question, [layer[0] for layer in ask], part(ask, 1, 3))
    theirs, index = expected(calls, ask)
    twin = question.fork()
    for copy in (question, twin):
        assert worst(play(copy, part(ask, 3, 5)), part(theirs, 3, 5)) < 1e-10
        assert [copy.held(layer) for layer in range(2)] == [[*seen, *range(53, 60)] for seen in index]
    with pytest.raises(RuntimeError, match="answer has begun"):
        question.retrieve(4)


def test_a_step_that_fails_at_its_end_leaves_no_block_behind(monkeypatch):
    calls, ask = random_calls([PROMPT, *[FRAME] * 6]), random_calls([4], seed=5)
    state = fed(build(), part(calls, 0, 6))
    before, inner, puts = answered(state, ask), Store.put, []

    def failing(store, *args, **options):
        puts.append(inner(store, *args, **options))
        if len(puts) == 2:
            raise KeyboardInterrupt
        return puts[-1]

    monkeypatch.setattr(Store, "put", failing)
    with pytest.raises(KeyboardInterrupt):
        play(state, part(calls, 6, 7))
    monkeypatch.undo()
    assert len(state.store) == 2 * 5 and state.position == PROMPT + 5 * FRAME
    assert worst(answered(state, ask)[0], before[0]) == 0
    play(state, part(calls, 6, 7))
    assert worst(answered(state, ask)[0], expected(calls, ask)[0]) < 1e-10


def test_inference_mode_may_come_and_go():
    calls, ask = random_calls([PROMPT, *[FRAME] * 6]), random_calls([4], seed=5)
    state = build()
    for n in range(7):
        with torch.inference_mode(n % 2 == 0):
            play(state, part(calls, n, n + 1))
    question = state.question()
    with torch.inference_mode():
        first, _ = asked(question, [layer[0] for layer in ask])
    later = play(question, part(random_calls([4, 3], seed=5), 1, None))
    theirs, _ = expected(calls, random_calls([4, 3], seed=5))
    assert worst([a + b for a, b in zip(first, later, strict=True)], theirs) < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_answers_in_other_dtypes(dtype):
    calls, ask = random_calls(SIZES), random_calls([4, 1], seed=5)
    calls, ask = (
        [[Call(*(getattr(c, n).to(dtype).double() for n in "qkv")) for c in layer] for layer in script]
        for script in (calls, ask)
    )
    question = fed(build(dtype=dtype), calls).question()
    with question.retrieve(4):
        outs = [
            question.attend(n, *(getattr(layer[0], name)[None].to(dtype) for name in "qkv"))[0]
            for n, layer in enumerate(ask)
        ]
    theirs, index = expected(calls, ask)
    assert [question.held(layer) for layer in range(2)] == index
    for out, one in zip(outs, theirs, strict=True):
        assert out.dtype is dtype and float((out.double() - one[0]).abs().max()) < 16 * torch.finfo(dtype).eps


def test_what_makes_no_sense_is_refused(tmp_path):
    for wrong in (
        {"n_local": 1}, {"n_local": 3}, {"n_init": 10}, {"frame": 0}, {"frame": 11}, {"retrieve_size": 0},
        {"chunk_size": 0}, {"chunk_size": 4}, {"n_init": -1},
    ):  # fmt: skip
        with pytest.raises(ValueError, match="rekv"):
            build(**wrong)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="no coordinates"):
        build(rope=ef.Rope.axial((4, 4, 4)))
    with pytest.raises(ValueError, match="cannot keep a store"):
        build(disk=str(tmp_path / "file"))
    state = fed(build(batch=1), random_calls([PROMPT, *[FRAME] * 4]))
    with pytest.raises(ValueError, match="cannot undo"):
        state.truncate(1)
    with pytest.raises(ValueError, match="cannot seek"):
        state.seek(100)
    with pytest.raises(ValueError, match="recache"), state.recache(FRAME):
        for layer in range(2):
            state.attend(
                layer,
                *(x[None] for x in (random_calls([FRAME])[layer][0].q, *[torch.zeros(2, FRAME, 12).double()] * 2)),
            )
    assert len(state.store) == 8 and all(a < b for a, b in pairwise(state.held(0)))
    two = build(batch=2)
    with pytest.raises(ValueError, match="change places"):
        two.reorder(torch.tensor([1, 1]))
