"""What must hold for the cache of StreamingVLM (arXiv 2510.09608): words outlive pictures, positions have no gaps."""

import random
from itertools import groupby

import pytest
import torch

import evenflow as ef
from evenflow.recipes.reference import attention, rotated, streaming_vlm
from evenflow.recipes.reference.streaming_vlm import TEXT, TURN, VISION, Token, edited, positions

from .drive import play, random_calls, worst

# Three axes over 12 channels, in sections as Qwen2.5-VL has them: time, rows, columns.
ROPE = ef.Rope(inv_freq=tuple(10_000 ** (-j / 6) for j in range(6)), axes=(0, 0, 1, 1, 2, 2))
BUDGET = {"window": 3, "text_round": 3, "text_sink": 4, "text_window": 5}
GRID = [(row, column) for row in range(2) for column in range(3)]
HUGE = {"window": 10**6, "text_round": 10**6, "text_sink": 10**6, "text_window": 10**6}


def build(rope=ROPE, kv_heads=2, **changes):
    memory = ef.recipe("streaming-vlm", **{**BUDGET, **changes})
    return memory.build(layers=2, heads=4, kv_heads=kv_heads, head_dim=12, rope=rope, dtype=torch.float64)


def tags(tokens):
    """Tags of (modality, segment, place) triples."""
    kinds, rounds, places = zip(*tokens, strict=True)
    return {
        "modality": torch.tensor(kinds), "segment": torch.tensor(rounds), "coordinates": torch.tensor(places),
    }  # fmt: skip


def round_of(number, answer, *, slices=1):
    """One second: "Time=..", a picture, the words said to it (they come in a step of their own)."""
    seen = (
        [(TURN, number, (0, 0))] * 2 + [(VISION, number, place) for place in GRID] * slices + [(TURN, number, (0, 0))]
    )
    said = [(TEXT, number, (0, 0))] * answer
    return [tags(seen), *([tags(said)] if said else [])]


def stream(rounds, *, before=3, seed=0, slices=1):
    """Tags of the steps of a dialogue: some words first, then rounds with answers of 0 to 4 words."""
    chance = random.Random(seed)
    steps = [tags([(TEXT, 0, (0, 0))] * before)] if before else []
    return steps + [step for r in range(1, rounds + 1) for step in round_of(r, chance.randint(0, 4), slices=slices)]


def calls_of(steps, **changes):
    return random_calls([len(step["modality"]) for step in steps], tags=steps, **changes)


def kinds_of(steps):
    """(modality, segment) of each token of the stream."""
    return [
        pair for s in steps for pair in zip(s["modality"].tolist(), s["segment"].tolist(), strict=True)
    ]  # fmt: skip


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("slices", [1, 2])
@pytest.mark.parametrize(("window", "text_round"), [(3, 3), (2, 4), (5, 2), (100, 100)])
def test_any_calls_equal_the_reference(window, text_round, slices, kv_heads):
    budget = {**BUDGET, "window": window, "text_round": text_round}
    calls = calls_of(stream(9, slices=slices), kv_heads=kv_heads, tentative=1)
    theirs = streaming_vlm.reference(calls, ROPE, **budget)
    assert worst(play(build(kv_heads=kv_heads, **budget), calls), theirs) < 1e-10


def anything(chance):
    """Tags of up to 9 tokens of any kind, whose rounds mostly go on; sometimes without places."""
    number, steps = 1, []
    for _ in range(25):
        tokens = []
        for _ in range(chance.randint(1, 3)):
            kind, number = chance.choice([TEXT, VISION, VISION, TURN]), number + chance.choice([0, 0, 0, 1, 2])
            segment = chance.choice([number] * 8 + [0, max(number - 2, 0)])
            tokens += [(kind, segment, (chance.randint(0, 2), chance.randint(0, 2)))] * chance.randint(1, 2)
            tokens.append((kind, segment, (chance.randint(0, 2), chance.randint(0, 2))))
        steps.append(tags(tokens))
        if chance.random() < 0.2:
            steps[-1].pop("coordinates")
    return steps


@pytest.mark.parametrize("seed", range(20))
def test_any_kind_of_tokens_in_any_order_equals_the_reference(seed):
    chance = random.Random(seed)
    budget = {name: chance.randint(0, 4) for name in BUDGET} | {"slice_step": chance.choice([0.5, 1.0, 2.0])}
    calls = calls_of(anything(chance), layers=1, seed=seed)
    memory = ef.recipe("streaming-vlm", **budget)
    state = memory.build(layers=1, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64)
    assert worst(play(state, calls), streaming_vlm.reference(calls, ROPE, **budget)) < 1e-10


def test_point_1_with_windows_as_long_as_the_stream_it_is_causal_attention_at_multimodal_positions():
    steps = stream(6, slices=2)
    calls, places, following = calls_of(steps), [], 0
    for step in steps:  # positions as Qwen2.5-VL gives them, from grids
        for kind, count in ((k, len(list(g))) for k, g in groupby(step["modality"].tolist())):
            if kind == VISION:
                block = [(s, *place) for s in range(2) for place in GRID]
                assert count == len(block)
                places += [[following + offset for offset in token] for token in block]
                following = max(max(place) for place in places[-count:]) + 1
            else:
                places += [[following + n] * 3 for n in range(count)]
                following += count
    ours = play(build(**HUGE), calls)
    for layer, outputs in zip(calls, ours, strict=True):
        q, k, v = (torch.cat([getattr(call, name) for call in layer], 1) for name in "qkv")
        bias = torch.full((4, len(places), len(places)), float("-inf"), dtype=torch.float64).triu(1)
        full = attention(rotated(q, places, ROPE), rotated(k, places, ROPE), v, bias)
        assert (torch.cat(outputs, 1) - full).abs().max() < 1e-10


def test_point_2_the_cache_is_bounded_over_ten_thousand_rounds():
    chance, held, index, most = random.Random(0), [], 0, 0
    for number in range(1, 10_001):
        for step in round_of(number, chance.randint(0, 4)):
            kinds = kinds_of([step])
            places = [tuple(p) for p in step["coordinates"].tolist()]
            fresh = [Token(index + n, *kinds[n], places[n]) for n in range(len(kinds))]
            index += len(fresh)
            held = edited(held, fresh, **BUDGET) + fresh
            most = max(most, len(held))
            assert max(max(place) for place in positions(held)) < 4 + 5 + 3 * (3 + 3 + 4)
    assert most <= 4 + 5 + 3 * (len(GRID) + 3 + 4)


def test_point_2_layers_hold_the_same_and_bytes_stay():
    state, steps = build(), stream(60)
    calls, sizes = calls_of(steps), []
    for t in range(len(steps)):
        play(state, [layer[t : t + 1] for layer in calls])
        assert state.held(0) == state.held(1)
        assert len(state.held(0)) <= 4 + 5 + 3 * (len(GRID) + 3 + 4)
        sizes.append(state.nbytes)
    assert sizes[-1] == sizes[len(sizes) // 3]


def test_point_3_words_step_by_one_and_pictures_start_behind_what_was_before():
    tokens = [Token(n) for n in range(2)] + [Token(2 + n, VISION, 1, place) for n, place in enumerate(GRID)]
    tokens += [Token(8, TURN, 1), Token(9, TEXT, 1)]
    assert positions(tokens) == [
        (0, 0, 0), (1, 1, 1), (2, 2, 2), (2, 2, 3), (2, 2, 4), (2, 3, 2), (2, 3, 3), (2, 3, 4), (5, 5, 5), (6, 6, 6),
    ]  # fmt: skip
    later = [Token(t.index + 1000, t.modality, t.segment + 100 * (t.segment > 0), t.place) for t in tokens]
    assert positions(later) == positions(tokens)


def test_point_3_the_same_sequence_gets_the_same_answer_whatever_was_evicted_before():
    """What is read over a cache depends on what survived, not on how far the stream has come."""
    young, old = build(text_sink=2, text_window=0), build(text_sink=2, text_window=0)
    words = calls_of([tags([(TEXT, 0, (0, 0))] * 2)])
    rounds = [step for r in range(40, 43) for step in round_of(r, 2)]
    last = calls_of(rounds, seed=3)
    play(young, words)
    play(old, words)
    play(old, calls_of([step for r in range(1, 31) for step in round_of(r, 2)], seed=5))
    ours, theirs = play(old, last), play(young, last)
    assert old.position > young.position
    assert worst(ours, theirs) < 1e-12


@pytest.mark.parametrize(("window", "text_round"), [(3, 3), (2, 4), (4, 2)])
def test_point_4_pictures_leave_with_their_round_and_answers_go_into_the_text(window, text_round):
    steps = [tags([(TEXT, 0, (0, 0))] * 2)] + [step for r in range(1, 13) for step in round_of(r, 2)]
    state = build(window=window, text_round=text_round, text_sink=3, text_window=4)
    calls, kinds = calls_of(steps), kinds_of(steps)
    for t in range(len(steps)):
        play(state, [layer[t : t + 1] for layer in calls])
        now = int(steps[t]["segment"][-1])
        held = state.held(0)
        assert len(set(held)) == len(held)
        of = {kind: {kinds[i][1] for i in held if kinds[i][0] == kind} for kind in (TEXT, VISION, TURN)}
        assert of[VISION] == set(range(max(now - window + 1, 1), now + 1))
        assert of[TURN] == set(range(max(now - text_round + 1, 1), now + 1))
        # Words of rounds that still stand, and at least the last 4 and the first 3 of the text memory.
        moved = [
            i for i in range(len(kinds[: state.position])) if kinds[i][0] == TEXT and kinds[i][1] <= now - text_round
        ]
        standing = [i for i in range(state.position) if kinds[i][0] == TEXT and kinds[i][1] > now - text_round]
        kept = moved[:3] + moved[-4:] if len(moved) > 7 else moved
        assert [i for i in held if kinds[i][0] == TEXT] == kept + standing


def test_point_4_moved_words_stand_before_older_pictures():
    """The answer of a round, once moved, has its place in front of everything that stands in its round."""
    steps = [step for r in range(1, 7) for step in round_of(r, 2)]
    budget = {"window": 4, "text_round": 2, "text_sink": 8, "text_window": 8}
    state, kinds, held = build(**budget), kinds_of(steps), []
    for t, call in enumerate(calls_of(steps)[0]):
        fresh = streaming_vlm.tokens_of(call, len(kinds_of(steps[:t])))
        held = edited(held, fresh, **budget) + fresh
    play(state, calls_of(steps))
    assert sorted(state.held(0)) == sorted(token.index for token in held)
    assert [kinds[token.index] for token in held[:10]] == [(TEXT, r) for r in (1, 1, 2, 2, 3, 3, 4, 4)] + [
        (VISION, 3)
    ] * 2


def test_point_5_what_a_round_attends_is_the_same_at_the_end_as_at_the_beginning():
    state = build()
    lengths = []
    for r in range(1, 51):
        play(state, calls_of(round_of(r, 2)))
        lengths.append(len(state.held(0)))
    assert len(set(lengths[10:])) == 1


def test_point_7_later_tokens_change_nothing_before():
    steps = stream(8)
    calls, other = calls_of(steps), calls_of(steps, seed=1)
    mixed = [mine[:9] + theirs[9:] for mine, theirs in zip(calls, other, strict=True)]
    for mine, changed in zip(play(build(), calls), play(build(), mixed), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine[:9], changed[:9], strict=True))
        assert not torch.equal(mine[9], changed[9])


def test_plain_text_is_sinks_and_recent_words_in_places_without_gaps():
    calls = random_calls([1] * 40)
    rope = ef.Rope()
    llm = ef.recipe("streaming-llm", sink=4, window=5)
    sinks = llm.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=rope, dtype=torch.float64)
    assert worst(play(build(rope), calls), play(sinks, calls)) < 1e-12
    assert worst(play(build(rope), calls), streaming_vlm.reference(calls, rope, **BUDGET)) < 1e-12


def test_pitfall_the_first_answers_become_sinks_where_the_text_before_is_short():
    steps = [step for r in range(1, 21) for step in round_of(r, 1)]
    state, kinds = build(), kinds_of(steps)
    play(state, calls_of(steps))
    words = [kinds[i][1] for i in state.held(0) if kinds[i][0] == TEXT]
    assert words[:4] == [1, 2, 3, 4] and words[4:] == list(range(13, 21))


def test_rows_of_a_batch_have_dialogues_of_their_own():
    """Rows whose tokens are of other kinds lose other tokens."""
    ours, other = stream(8, before=0), stream(8, before=0)
    for step in other:
        step["modality"] = torch.where(step["modality"] == VISION, TURN, step["modality"])
    scripts = [calls_of(ours), calls_of(other, seed=1)]
    memory = ef.recipe("streaming-vlm", **{**BUDGET, "window": 2})
    together = memory.build(layers=2, heads=4, kv_heads=2, head_dim=12, rope=ROPE, dtype=torch.float64, batch=2)
    alone = [play(build(window=2), script) for script in scripts]
    for t in range(len(ours)):
        both = {name: torch.stack([ours[t][name], other[t][name]]) for name in ours[t]}
        with together.step(len(ours[t]["segment"]), tags=both):
            for layer in range(2):
                calls = [script[layer][t] for script in scripts]
                out = together.attend(layer, *(torch.stack([getattr(c, name) for c in calls]) for name in "qkv"))
                for row in range(2):
                    assert (out[row] - alone[row][layer][t]).abs().max() < 1e-12
    assert together.held(0, row=0) != together.held(0, row=1)
