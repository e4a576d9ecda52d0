"""What must hold for the bounded cache of LiveVLM (arXiv 2505.15269 v2) and for questions to it."""

import pytest
import torch

import evenflow as ef
from evenflow.memory.coverage import buckets, spread_best
from evenflow.recipes.reference import live_vlm

from .drive import asked, play, random_calls, worst

ROPE = ef.Rope()
FRAME, PROMPT, KEEP, RECENT, CLIP = 2, 2, 12, 2, 8
SMALL = {"frame": FRAME, "prompt": PROMPT, "cache_size": KEEP, "recent_frames": 1, "clip_frames": 4, "observe": 2}
QUESTION = {"page": 3, "retr_ratio": 0.4}


def build(batch=1, *, rope=ROPE, heads=4, kv_heads=2, **params):
    memory = ef.recipe("live-vlm", **{**SMALL, **QUESTION, **params})
    return memory.build(
        layers=2, heads=heads, kv_heads=kv_heads, head_dim=12, rope=rope, batch=batch, dtype=torch.float64
    )


def full():
    memory = ef.recipe("window", window=1000)
    return memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)


def part(calls, start, stop):
    return [layer[start:stop] for layer in calls]


def expected(calls, sizes, params, question, later):
    """The same by the reference, one call of the stream at a time."""
    names = {k: v for k, v in {**SMALL, **params}.items() if k not in ("page", "retr_ratio")}
    _, kept = live_vlm.run(calls, ROPE, **{**DEFAULTS, **names})
    outs, seen = [], []
    for layer, history in enumerate(kept):
        k, v = (torch.cat([getattr(c, name) for c in calls[layer] if c.commit], 1) for name in "kv")
        held = history[-1]
        index = live_vlm.retrieved(
            question[layer].q, k[:, held], held, prompt=SMALL["prompt"], recent=RECENT, consumed=sum(sizes),
            page=3, retr_ratio=params.get("retr_ratio", 0.4),
        )  # fmt: skip
        places = torch.tensor(index if params.get("positions") == "stream" else range(len(index)))
        outs.append(live_vlm.ask(question[layer], later[layer], k[:, index], v[:, index], places, ROPE))
        seen.append(index)
    return outs, seen


DEFAULTS = {"scatter_ratio": 0.5, "capacity": 1, "bucket_by": "index", "positions": "packed"}


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("params", [
    {}, {"bucket_by": "time"}, {"positions": "stream"}, {"capacity": 3}, {"scatter_ratio": 0.0}, {"scatter_ratio": 1.0},
])  # fmt: skip
def test_any_calls_equal_the_reference(params, kv_heads):
    calls = random_calls([8, 8, 8, 3, 5, 1, 2, 5, 20, 8], tentative=1, kv_heads=kv_heads)
    theirs = live_vlm.reference(calls, ROPE, **{**SMALL, **params})
    assert worst(play(build(kv_heads=kv_heads, **params), calls), theirs) < 1e-10


@pytest.mark.parametrize("cut", [1, 2, 4, 8])
def test_plain_text_in_any_cut_that_ends_with_the_clips_is_the_same(cut):
    whole = random_calls([CLIP] * 8)
    pieces = [
        [type(c)(*(t[:, i : i + cut] for t in (c.q, c.k, c.v))) for c in layer for i in range(0, CLIP, cut)]
        for layer in whole
    ]
    ours = [torch.cat(layer, 1) for layer in play(build(), pieces)]
    once = [torch.cat(layer, 1) for layer in play(build(), whole)]
    assert max(float((a - b).abs().max()) for a, b in zip(ours, once, strict=True)) < 1e-12


def test_point_1_below_the_budget_it_is_the_full_cache():
    calls = random_calls([CLIP] * 8)
    assert worst(play(build(cache_size=64), calls), play(full(), calls)) < 1e-12
    state = build(cache_size=64)
    play(state, calls)
    assert state.held(0) == [*range(64)]


def test_point_2_the_budget_is_exact_and_what_stays_is_bit_equal():
    calls, state = random_calls([CLIP] * 12), build()
    for n in range(12):
        play(state, part(calls, n, n + 1))
        for layer in range(2):
            held, consumed = state.held(layer), (n + 1) * CLIP
            old = [t for t in held if PROMPT <= t < consumed - RECENT]
            assert len(old) == min(consumed - RECENT - PROMPT, KEEP) and held == sorted(set(held))
            assert held[:PROMPT] == [0, 1] and held[-RECENT:] == [consumed - 2, consumed - 1]
            data = state.state_dict()
            index = data[f"tables.{layer}.index"][0, 0].tolist()
            columns = [index.index(t) for t in held]
            for name in ("keys", "values"):
                came = torch.cat([getattr(c, name[0]) for c in calls[layer][: n + 1]], 1)
                assert torch.equal(data[f"layers.{layer}.{name}"][0][:, columns], came[:, held])


@pytest.mark.parametrize("capacity", [1, 2, 4])
def test_point_3_the_best_survive_and_no_bucket_fills_itself_over(capacity):
    made = torch.Generator().manual_seed(0)
    scores, there = torch.rand(5, 40, generator=made), torch.ones(5, 40, dtype=torch.bool)
    bucket = buckets(there.cumsum(-1), there.sum(-1), 12 // capacity)
    kept = spread_best(scores, bucket, there, keep=12, top=6, capacity=capacity)
    for s, b, k in zip(scores, bucket, kept, strict=True):
        best = s.argsort(descending=True)[:6]
        assert k[best].all() and int(k.sum()) == 12
        for number in b.unique():
            inside = k & (b == number)
            assert int(inside.sum()) <= max(capacity, int((b[best] == number).sum()))


def decaying(seed, length=4000):
    """Attention as it falls with distance, and 20 tokens far back that are always attended."""
    made = torch.Generator().manual_seed(seed)
    scores = (-(length - torch.arange(1, length + 1.0)) / 300).exp() + 0.02 * torch.rand(length, generator=made)
    planted = torch.randperm(3000, generator=made)[:20]
    scores[planted] += 2
    return scores, planted


def thinned(scores, top, keep=400):
    there = torch.ones_like(scores, dtype=torch.bool)
    kept = spread_best(scores, buckets(there.cumsum(-1), there.sum(), keep), there, keep=keep, top=top)
    index = kept.nonzero()[:, 0]
    gap = int(torch.nn.functional.pad(index, (1, 1), value=0).diff()[:-1].max())
    return index, len((index // 200).unique()), gap, float(scores[index].sum())


@pytest.mark.parametrize("seed", range(3))
def test_point_4_it_covers_where_the_best_alone_crowd(seed):
    scores, planted = decaying(seed)
    ours, covered, gap, mass = thinned(scores, 200)
    best, crowded, far, most = thinned(scores, 400)
    assert set(planted.tolist()) <= set(ours.tolist()) and set(planted.tolist()) <= set(best.tolist())
    assert covered >= 19 and crowded <= 16 and gap < far and 0.6 < mass / most < 0.9
    masses = [thinned(scores, top)[3] for top in range(0, 401, 50)]
    assert masses == sorted(masses) and masses[0] / most < 0.45


def test_point_5_scores_are_the_last_rows_of_the_whole_attention():
    calls = random_calls([30], layers=1)[0][0]
    q, k = (live_vlm.rotated(x, torch.arange(30), ROPE) for x in (calls.q, calls.k))
    logits = q @ k.repeat_interleave(2, 0).transpose(1, 2) * 12**-0.5
    whole = logits.masked_fill(torch.ones(30, 30).triu(1).bool(), -torch.inf).softmax(-1)
    s = live_vlm.scores(q[:, -6:], k, [*range(24, 30)], [*range(30)])
    assert float((s - whole[:, -6:].mean((0, 1))).abs().max()) < 1e-12


def test_point_6_mean_keys_of_rotated_neighbours_are_nobodys():
    made = torch.Generator().manual_seed(0)
    rope, dim, right, lengths = ef.Rope(), 128, [0, 0], [0.0, 0.0]
    for _ in range(40):
        pages = torch.randn(20, 1, dim, generator=made, dtype=torch.float64)
        keys = pages + 0.3 * torch.randn(20, 16, dim, generator=made, dtype=torch.float64)
        query = pages[7, 0] + 0.5 * torch.randn(dim, generator=made, dtype=torch.float64)
        at = torch.randint(20_000, (320,), generator=made)
        turned = live_vlm.rotated(keys.reshape(320, dim), at, rope).reshape(20, 16, dim)
        for n, (k, q) in enumerate([(keys, query), (turned, live_vlm.rotated(query[None], [20_000], rope)[0])]):
            means = k.mean(1)
            lengths[n] += float((means.norm(dim=-1) / k.norm(dim=-1).mean(1)).mean()) / 40
            right[n] += int((means @ q).argmax()) == 7
    assert abs(lengths[0] - 0.96) < 0.02 and abs(lengths[1] - 0.30) < 0.08
    assert right[0] == 40 and right[1] < 10


def test_point_7_what_is_held_and_its_bytes_are_bounded():
    state = build()
    sizes, most = set(), 0
    for n in range(60):
        play(state, random_calls([CLIP], seed=n))
        most = max(most, *(len(state.held(layer)) for layer in range(2)))
        sizes.add(state.nbytes)
    assert most <= PROMPT + KEEP + RECENT + CLIP and len(sizes) == 1


def test_point_7_a_question_reads_a_share():
    state = build(cache_size=120)
    play(state, random_calls([CLIP] * 30))
    _, seen = asked(state, [layer[0] for layer in random_calls([4], seed=1)])
    assert all(len(s) == PROMPT + 0.4 * 120 + RECENT for s in seen)


@pytest.mark.parametrize("sizes", [[CLIP] * 6, [3], [CLIP, 1], [CLIP] * 3 + [5]])
@pytest.mark.parametrize("params", [{}, {"positions": "stream"}, {"retr_ratio": 0.0}, {"retr_ratio": 0.7}])
def test_questions_equal_the_reference(params, sizes):
    calls, ask = random_calls(sizes), random_calls([4, 3, 1, 1], seed=5)
    state = build(**params)
    play(state, calls)
    question, later = [layer[0] for layer in ask], part(ask, 1, 4)
    outs, seen = asked(state, question, later)
    theirs, index = expected(calls, sizes, params, question, later)
    assert seen == index
    assert worst(outs, theirs) < 1e-10


def test_point_8_a_question_to_everything_reads_everything():
    calls, ask = random_calls([CLIP] * 5), random_calls([4], seed=5)
    state, every = build(retr_ratio=1.0), full()
    play(state, calls)
    _, seen = asked(state, [layer[0] for layer in ask])
    assert seen == [state.held(layer) for layer in range(2)]
    big = build(retr_ratio=1.0, cache_size=100)
    play(big, calls)
    play(every, calls)
    assert worst(asked(big, [layer[0] for layer in ask])[0], play(every, ask)) < 1e-10


def test_point_9_questions_change_nothing_and_can_be_asked_again():
    calls, ask = random_calls([CLIP] * 6), random_calls([4, 3], seed=5)
    state, alone = build(), build()
    play(state, part(calls, 0, 4))
    play(alone, part(calls, 0, 4))
    before = state.state_dict()
    question, later = [layer[0] for layer in ask], part(ask, 1, 2)
    first = asked(state, question, later)
    second = asked(state, question, later)
    assert worst(first[0], second[0]) == 0 and first[1] == second[1]
    after = state.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert worst(play(state, part(calls, 4, 6)), play(alone, part(calls, 4, 6))) == 0


def test_rows_of_a_batch_choose_for_themselves():
    scripts = [random_calls([CLIP] * 6, seed=seed) for seed in (0, 1)]
    ask = [random_calls([4], seed=seed) for seed in (5, 6)]
    state = build(batch=2)
    for step in range(6):
        with state.step(CLIP):
            for layer in range(2):
                state.attend(layer, *(torch.stack([getattr(s[layer][step], n) for s in scripts]) for n in "qkv"))
    question = state.question()
    with question.retrieve(4):
        outs = [
            question.attend(layer, *(torch.stack([getattr(a[layer][0], n) for a in ask]) for n in "qkv"))
            for layer in range(2)
        ]
    for row in range(2):
        alone = build()
        play(alone, scripts[row])
        theirs, seen = asked(alone, [layer[0] for layer in ask[row]])
        assert [state.held(layer, row) for layer in range(2)] == [alone.held(layer) for layer in range(2)]
        assert [question.held(layer, row) for layer in range(2)] == seen
        assert max(float((outs[n][row] - theirs[n][0]).abs().max()) for n in range(2)) < 1e-10


def test_rows_of_different_age_are_thinned_at_their_own_time():
    calls = [random_calls([4] * 12, seed=seed) for seed in (0, 1)]
    state = build(batch=2)
    for step in range(12):
        mask = torch.tensor([[True] * 4, [step % 3 != 1] * 4])
        with state.step(4, mask=mask):
            for layer in range(2):
                state.attend(layer, *(torch.stack([getattr(c[layer][step], n) for c in calls]) for n in "qkv"))
    for row, steps in enumerate([range(12), [n for n in range(12) if n % 3 != 1]]):
        alone = build()
        play(alone, [[layer[n] for n in steps] for layer in calls[row]])
        assert [state.held(layer, row) for layer in range(2)] == [alone.held(layer) for layer in range(2)]


def test_a_rope_with_several_axes_turns_queries_and_keys_where_their_tokens_are():
    rope = ef.Rope(inv_freq=tuple(100 ** (-j / 6) for j in range(6)), axes=(0, 1, 2) * 2)
    tags = {"coordinates": torch.tensor([[n // 4, n % 4] for n in range(CLIP)])}
    whole = random_calls([CLIP] * 6, tags=[tags] * 6)
    cut = [
        [
            type(c)(*(t[:, i : i + 1] for t in (c.q, c.k, c.v)), tags={"coordinates": tags["coordinates"][i : i + 1]})
            for c in layer
            for i in range(CLIP)
        ]
        for layer in whole
    ]
    one, many = build(rope=rope), build(rope=rope)
    play(one, whole)
    play(many, cut)
    assert [one.held(n) for n in range(2)] == [many.held(n) for n in range(2)]


def test_what_makes_no_sense_is_refused():
    for wrong in (
        {"bucket_by": "size"}, {"positions": "none"}, {"page": 0}, {"retr_ratio": 1.5}, {"capacity": 20}, {"prompt": -1}
    ):  # fmt: skip
        with pytest.raises(ValueError, match="live-vlm"):
            build(**wrong)
