"""What must hold for OmniForcing (arXiv 2603.11647): video and audio in blocks of a second, each reading the other."""

import math
from dataclasses import replace

import pytest
import torch

from evenflow.memory import Linked, Rope, linked_blocks, linked_mask, linked_places
from evenflow.memory.linked_clock import Latents
from evenflow.memory.rope import Rotary

from ..memory.linked_drive import F64, OWN, READS, Duet, draw, feed, tiny

PAPER = Linked(grid=(2, 2))
RELEASED = Linked(first=(4, 26), sinks=0, grid=(2, 2))


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize("latents", [4, 7, 11, 16, 18])
def test_point_1_cached_equals_masked(layout, latents):
    duet = Duet(layout)
    video, audio = duet.inputs(latents)
    with torch.no_grad():
        packed = duet.packed(video, audio)
    for got, expected in zip(duet.stream(duet.build(), video, audio), packed, strict=True):
        assert got.shape == expected.shape
        assert (got - expected).abs().max() < 1e-9


def test_point_1_in_float32():
    duet = Duet(PAPER)
    inputs = duet.inputs(16)
    with torch.no_grad():
        packed = duet.packed(*inputs)
    low, state = duet.float(), PAPER.build(layers=2, **OWN, dtype=torch.float32)
    for got, expected in zip(low.stream(state, *(x.float() for x in inputs)), packed, strict=True):
        assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("modality", ["video", "audio"])
@pytest.mark.parametrize("block", [0, 1, 3])
def test_point_2_causal_across_modalities(modality, block):
    duet = Duet(PAPER)
    video, audio = duet.inputs(13)
    base = duet.stream(duet.build(), video, audio)
    changed = {"video": video.clone(), "audio": audio.clone()}
    x = changed[modality]
    x[duet.of_block(modality, 13) == block] += torch.linspace(-1, 1, x.shape[1], dtype=x.dtype)
    now = duet.stream(duet.build(), *changed.values())
    for name, before, after in zip(("video", "audio"), base, now, strict=True):
        differs, blocks = (before != after).any(-1), duet.of_block(name, 13)
        assert not differs[blocks < block].any()
        assert differs[blocks >= block].all()


def test_point_3_counts_of_the_paper_s_layout():
    for latents in (1, 4, 7, 16, 31):
        assert sum(b.audio for b in PAPER.blocks(latents)) == 1 + 25 * (latents - 1) // 3
    seen = {read: linked_mask(PAPER, read, 16).sum(1) for read in READS}
    first_of = [0, *range(4, 64, 12)]  # the first video token of each block; four a latent
    assert seen["a2v"][first_of].tolist() == [17, 42, 67, 92, 117, 142]
    sound = [0, *range(17, 142, 25)]  # the first sink, then the first audio latent of each second
    assert (seen["v2a"][sound] // 4).tolist() == [1, 4, 7, 10, 13, 16]
    assert linked_blocks(PAPER, "audio", 16).bincount().tolist() == [17, 25, 25, 25, 25, 25]


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
def test_point_3_both_layouts_cover_16_and_126(layout):
    blocks = layout.blocks(16)
    assert [sum(side) for side in zip(*blocks, strict=True)] == [16, 126]
    assert all(block == (3, 25) for block in blocks[1:])
    assert blocks[0] == layout.first


def test_point_3_a_last_block_that_is_not_whole():
    assert PAPER.blocks(6)[-1] == Latents(2, 16)
    assert PAPER.blocks(5)[-1] == Latents(1, 8)
    state = PAPER.build(layers=1, **OWN, **F64)
    for latents in PAPER.blocks(6):
        feed(state, draw(state, latents.video), latents.video)
    assert state.position == (6, 1 + 25 + 16)


@pytest.mark.parametrize("layout", [PAPER, RELEASED], ids=["paper", "released"])
def test_point_4_both_modalities_end_a_block_together(layout):
    tick = layout.clock.ticks
    for block in (0, 1, 2, 5, 1000, 10**6) if layout is RELEASED else (1, 2, 5, 1000, 10**6):
        video, audio = (int(layout.places(name, block)[-1, 0]) for name in ("video", "audio"))
        assert abs(video - audio) < tick / 6
        at = layout.starts(block + 1)
        assert video == int(tick * ((8 * (at.video - 1) - 7 + 8 * (at.video - 1) + 1) / 48)) - 10 * tick


def test_point_4_equal_seconds_turn_alike_across_modalities():
    """Each at its own latents' times: only the difference in seconds counts, at any second."""
    clock, width = PAPER.clock, 48
    rotary = Rotary(clock.rope(width), width, torch.float64, torch.device("cpu"))
    made = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, width, generator=made, dtype=torch.float64)
    logits = []
    for second in (1, 2, 19, 3600):
        video, audio = clock.times("video", 3 * second, 1), clock.times("audio", 25 * second, 1)
        assert int(video - audio) == -138  # the middles of their last frame and hop
        logits.append(float(rotary.rotate(q, *rotary.at(video)) @ rotary.rotate(k, *rotary.at(audio)).mT))
    assert max(logits) - min(logits) < 1e-10


def sink_keys(state):
    """Sink keys of every read that has them."""
    return [
        state.rings[read].keys[layer][:, :, : state.linked.sinks].clone()
        for read in ("audio", "a2v")
        for layer in (0, 1)
    ]


def test_point_5_sink_keys_never_change_and_do_not_turn():
    state = tiny(sinks=16).build()
    fresh = draw(state)
    feed(state, fresh)
    first = sink_keys(state)
    raw = [fresh[layer, read][1][:, :, :16] for read in ("audio", "a2v") for layer in (0, 1)]
    assert all(torch.equal(a, b) for a, b in zip(first, raw, strict=True))
    for _ in range(6):
        feed(state, draw(state))
    assert all(torch.equal(a, b) for a, b in zip(first, sink_keys(state), strict=True))
    assert state.position == (19, 151)  # sinks are no latents


def test_point_5_sinks_are_taken_off_the_result():
    duet = tiny(sinks=16)
    video, audio = duet.inputs(7)
    got = duet.stream(duet.build(), video, audio)
    assert [len(x) for x in got] == [7 * 4, 51]
    assert [len(x) for x in duet.packed(video, audio)] == [7 * 4, 51]


def test_point_5_without_rotation_a_sink_is_as_near_in_any_second():
    """A query of zeros but for what meets the sinks: their share does not depend on how old the stream is."""
    state = tiny(sinks=4, window=1).build(rope=None)
    shares = []
    for n in range(6):
        fresh = draw(state, seed=1)
        for (_, read), (q, k, v) in fresh.items():
            q.fill_(0.5)
            k.zero_()
            v.zero_()
            if n == 0 and read in ("audio", "a2v"):
                k[:, :, :4], v[:, :, :4] = 1.0, 1.0
        shares.append(float(feed(state, fresh)[0, "a2v"].mean()))
    assert shares[2:] == pytest.approx([shares[2]] * 4, abs=1e-14)  # 4 sinks, one latent, two seconds
    logit = math.exp(0.5 * 12 * 12**-0.5)
    assert shares[-1] == pytest.approx(4 * logit / (4 * logit + 1 + 50), abs=1e-12)


def test_point_6_the_first_audio_is_less_certain_with_sinks():
    entropy = {}
    for sinks in (0, 4, 8, 16):
        duet, found = tiny(sinks=sinks), []

        def attend(layer, read, q, k, v, found=found):
            weights = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            if read == "audio":
                found.append(float(-(weights * weights.log()).sum(-1).mean()))
            return weights @ v

        video, audio = duet.inputs(1)
        with torch.no_grad():
            duet(video, audio, attend, sinks)
        entropy[sinks] = sum(found) / len(found)
    assert entropy[0] == pytest.approx(0, abs=1e-12)
    assert entropy[4] < entropy[8] < entropy[16] < math.log(17)
    assert entropy[16] > 0.9 * math.log(17)


def test_point_6_gradients_of_early_audio_are_smaller_with_more_sinks():
    norms = {}
    for sinks in (0, 4, 8, 16):
        norms[sinks] = 0.0
        for seed in range(8):
            duet = Duet(replace(PAPER, sinks=sinks), seed=seed)
            video, audio = duet.inputs(7, seed)
            audio.requires_grad_()
            heard = duet.packed(video, audio)[1]
            wanted = torch.randn(heard.shape, generator=torch.Generator().manual_seed(seed + 99), dtype=heard.dtype)
            (early,) = torch.autograd.grad((heard - wanted).square().mean(), audio)
            norms[sinks] += float(early[:6].norm()) / 8
    assert norms[16] < norms[8] < norms[4] < norms[0]


@pytest.mark.parametrize("window", [1, 3])
def test_point_7_all_four_memories_are_bounded_and_lose_the_same_seconds(window):
    state = replace(PAPER, window=window).build(layers=1, **OWN, **F64)
    size, pieces = state.nbytes, []
    for n in range(window + 6):
        with state.step(commit=False) as step:
            pieces.append({read: sum(piece.stop - piece.start for piece in step.pieces[read]) for read in READS})
        feed(state, draw(state))
        assert state.held(0) == [0, *range(max(1, n + 1 - window), n + 1)]
        assert state.nbytes == size
    full = {"video": 4 + 12 * (window + 1), "audio": 17 + 25 * (window + 1)}
    expected = {"video": full["video"], "audio": full["audio"], "a2v": full["audio"], "v2a": full["video"]}
    assert all(one == expected for one in pieces[window + 1 :])
    assert pieces[window] != expected


# -- pitfalls --------------------------------------------------------------------------------------------------------


def test_pitfall_block_0_does_not_see_what_comes_later():
    for read in READS:
        mask, asks = (
            linked_mask(PAPER, read, 10),
            linked_blocks(PAPER, "video" if read in ("video", "a2v") else "audio", 10),
        )
        gives = linked_blocks(PAPER, "video" if read in ("video", "v2a") else "audio", 10)
        assert not mask[asks == 0][:, gives > 0].any()
        assert mask[:, gives == 0].all()


def test_pitfall_the_first_latent_is_one_frame():
    places = {name: linked_places(replace(PAPER, sinks=0), name, 7)[:, 0].double() for name in ("video", "audio")}
    seconds = {"video": places["video"][::4] / 1200 + 10, "audio": places["audio"] / 1200 + 10}
    assert seconds["video"].tolist() == pytest.approx([(max(0, 8 * n - 7) + 8 * n + 1) / 48 for n in range(7)])
    assert seconds["audio"].tolist() == pytest.approx([(max(0, 4 * n - 3) + 4 * n + 1) / 200 for n in range(51)])


def test_pitfall_angles_stay_small_where_latents_count_seconds():
    """Raw indices as seconds would turn the lowest frequency, 25 latents a second, half round in a second."""
    rope, last = PAPER.clock.rope(48), PAPER.places("audio", 5)[-1, 0]
    assert isinstance(rope, Rope) and abs(float(last) * rope.inv_freq[0]) < math.pi / 2


def test_pitfall_layout_and_sinks_are_configuration():
    duet, other = tiny(), tiny(sinks=5)
    with pytest.raises(ValueError, match="another layout"):
        other.build().load_state_dict(duet.build().state_dict())


def test_beyond_the_span_a_horizon_keeps_the_sinks_near():
    """The same block reads the same at any age, where block 0 and the sinks come along; without, it does not."""
    for horizon, moves in ((3, False), (None, True)):
        state, reads = replace(PAPER, window=1, horizon=horizon).build(layers=1, **OWN, **F64), []
        block0 = draw(state)
        fresh = None
        for n in range(9):
            if n == 1:
                fresh = draw(state)
            out = feed(state, block0 if n == 0 else fresh)
            reads.append(out[0, "audio"])
        assert ((reads[4] - reads[8]).abs().max() > 1e-3) == moves
        assert moves or (reads[4] - reads[8]).abs().max() < 1e-10
