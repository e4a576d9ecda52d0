"""Training of the tiny video model, on a smaller one: the codec, clips, roll-outs, distribution matching, checkpoints."""

import json
import os
import socket
from dataclasses import replace

import numpy as np
import pytest
import torch

from evenflow.learn.video import clips as making
from evenflow.learn.video import codec as fitting
from evenflow.learn.video import words as reading
from evenflow.learn.video.attention import Clip, Rollout
from evenflow.learn.video.clips import CHUNK, Clips, Shards, coded, conditions, filmed
from evenflow.learn.video.distill import Distillation, Sequence, called, grid, matched, roll, seen_whole, warped
from evenflow.learn.video.pretrain import EQUAL, RISING, Mix, Named, Pretraining, apart, levels, started
from evenflow.learn.video.run import Average, Run, agreed, grown, joined, optimizers, shared
from evenflow.learn.video.words import nouns
from evenflow.models.video import PRESETS, VideoTransformer, places
from evenflow.models.video.codec import TinyCodec, blocks, unblocked
from evenflow.models.video.dense import Dense, chunk_causal
from evenflow.models.video.files import load_words
from evenflow.models.video.tracks import canvas
from evenflow.models.video.words import Words, split
from evenflow.recipes import recipe

SMALL = replace(
    PRESETS["tiny"], dim=32, ffn_dim=64, heads=2, layers=2, text_dim=16, text_len=12, freq_dim=16, size=(16, 16)
)
SIZE = SMALL.latent_size()


def network(seed=0):
    torch.manual_seed(seed)
    model = VideoTransformer(SMALL)
    started(model)
    torch.nn.init.normal_(model.head.head.weight, std=0.1)
    return model


def words():
    torch.manual_seed(1)
    return Words(["a", "red", "blue", "circle", "square"], SMALL.text_dim, SMALL.text_len)


def streams(model, rows=2, chunks=6, window=12):
    cache = Rollout(model.rope, SMALL.head_dim, *grid(SMALL), sink=CHUNK, window=window)
    said = [["a red circle"] * 2 + ["a blue square"] * (chunks - 2)] * rows
    return Sequence(cache, said, torch.randn(rows, 2 * CHUNK, SMALL.in_channels - SMALL.out_channels, *SIZE))


# -- attention of training is that of streams ------------------------------------------------------------------------


def test_clips_attend_as_the_masked_definition_says():
    model = network()
    times = torch.tensor([0, 1, 2, 9, 10, 11])
    q, k, v = torch.randn(3, 2, SMALL.heads, 6 * 4, SMALL.head_dim)
    for chunk, sees in ((CHUNK, chunk_causal(6, CHUNK)), (None, None)):
        ours = Clip(model.rope, SMALL.head_dim, times, 2, 2, chunk)(0, q, k, v)
        torch.testing.assert_close(ours, Dense(model.rope, SMALL.head_dim, times, 2, 2, sees)(0, q, k, v))


def test_a_roll_out_reads_and_keeps_what_the_memory_of_a_stream_does():
    """Training and inference agree: keys and values of the last chunk, and what is made of them."""
    model, length = network(), 6
    frame = int(np.prod(grid(SMALL)))
    state = recipe("longlive", infinity=True, frame=frame).build(
        layers=SMALL.layers, heads=SMALL.heads, head_dim=SMALL.head_dim, rope=model.rope, dtype=torch.float32
    )
    rows = streams(model, rows=1, chunks=length)
    text = model.read(words().encode(["a red circle"]).detach())
    tags = {"coordinates": places(CHUNK, *grid(SMALL))}
    with torch.no_grad():
        for chunk in range(length):
            tracks = torch.randn(1, CHUNK, SMALL.in_channels - SMALL.out_channels, *SIZE)
            rows.cache.room(CHUNK)
            for sigma, keep in ((1.0, False), (0.5, False), (0.0, True)):
                x = torch.randn(1, CHUNK, SMALL.out_channels, *SIZE)
                ours = called(model, x, sigma, tracks, text, rows.cache, keep)
                times = torch.full((1, CHUNK), 1000 * sigma)
                with state.step(CHUNK * frame, tags=tags, commit=keep):
                    velocity = model(torch.cat([x, tracks], 2), times, text, state.attend)
                torch.testing.assert_close(ours, x - sigma * velocity, rtol=1e-4, atol=1e-5)
            assert rows.cache.frames == min(CHUNK * (chunk + 1), 12)


def test_tracks_of_many_clips_are_drawn_at_once_as_one_by_one():
    torch.manual_seed(0)
    points, visible = torch.rand(3, 8, 2, 2) * 20 - 2, torch.rand(3, 8, 2) < 0.7
    ids = torch.randint(1000, (3, 2))
    many = canvas(points, visible, ids, SIZE, SMALL.stride)
    each = [canvas(*row, SIZE, SMALL.stride) for row in zip(points, visible, ids, strict=True)]
    assert many.shape == (3, 2, SMALL.in_channels - SMALL.out_channels, *SIZE)
    torch.testing.assert_close(many, torch.stack(each))


def test_texts_of_another_stock_are_read_anew():
    training = Pretraining(SMALL, Mix(), 0)
    clips = Clips(*torch.zeros(4, 1), texts=["a red circle", "a blue star"])
    ours = training.told(clips, torch.tensor([0, 1]))
    clips.texts.append("a green ring")  # the stock has grown
    grown = training.told(clips, torch.tensor([2, 0]))
    torch.testing.assert_close(grown, training.words.encode(["a green ring", "a red circle", ""]))
    torch.testing.assert_close(ours, training.words.encode([*clips.texts[:2], ""]))
    other = training.told(Clips(*torch.zeros(4, 1), texts=["a blue star"]), torch.tensor([0]))
    torch.testing.assert_close(other, training.words.encode(["a blue star", ""]))


# -- roll-outs and distribution matching -------------------------------------------------------------------------------


@pytest.mark.parametrize("exit_step", [0, 2])
def test_gradient_reaches_one_call_of_a_chunk_and_no_cache(exit_step):
    model, sigmas = network(), warped(SMALL.steps, SMALL.shift)
    calls = []
    forward = model.forward
    model.forward = lambda *given: calls.append(torch.is_grad_enabled()) or forward(*given)
    rows = streams(model)
    x, text, tracks = roll(model, words(), rows, 3, exit_step, sigmas)
    assert x.shape == (2, 9, SMALL.out_channels, *SIZE) and x.requires_grad and rows.at == 3
    assert text.shape[:2] == (2, 3) and tracks.shape[:2] == (2, 9)
    assert not tracks[:, 6:].any(), "behind the end of the clip nothing is drawn"
    assert calls == ([False] * exit_step + [True, False]) * 3
    assert not any(kept.requires_grad for pair in rows.cache.kept.values() for kept in pair)
    x.square().mean().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if name.startswith("blocks"))


def test_a_chunk_gets_no_gradient_from_the_chunks_behind_it():
    model = network()
    x, _, _ = roll(model, words(), streams(model), 3, 0, warped(SMALL.steps, SMALL.shift))
    first = torch.autograd.grad(x[:, :3].sum(), model.head.head.weight, retain_graph=True)[0]
    both = torch.autograd.grad(x[:, :3].sum() + 0 * x[:, 3:].sum(), model.head.head.weight)[0]
    torch.testing.assert_close(first, both)


def test_a_memory_that_goes_on_does_not_grow():
    model, sigmas, rows, sizes = network(), warped(SMALL.steps, SMALL.shift), None, []
    rows = streams(model, chunks=12)
    for _ in range(4):
        roll(model, words(), rows, 3, 0, sigmas, graded=False)
        sizes.append(sum(kept.nbytes for pair in rows.cache.kept.values() for kept in pair))
    assert sizes[1] == sizes[-1] and rows.cache.frames == 12


def test_matching_moves_only_where_fake_and_real_differ():
    x = torch.randn(2, 3, 4, 2, 2, requires_grad=True)
    real, fake = torch.randn_like(x), torch.randn_like(x)
    matched(x, real, real).backward()
    assert not x.grad.any()
    x.grad = None
    matched(x, fake, real).backward()
    size = (x - real).abs().mean((1, 2, 3, 4), keepdim=True)
    torch.testing.assert_close(x.grad, (fake - real) / size / x.numel(), rtol=1e-4, atol=1e-8)


def test_matching_moves_the_mean_of_a_gaussian_to_the_teachers():
    """A generator that only knows its mean; scores of both sides are exact for unit variance."""
    torch.manual_seed(0)
    mean = torch.tensor(-2.0, requires_grad=True)
    optimizer = torch.optim.Adam([mean], 0.05)
    for _ in range(300):
        x = mean + torch.randn(64, 1, 1, 1, 1)
        sigma = torch.rand(64, 1, 1, 1, 1).clamp(0.02, 0.98)
        noisy = ((1 - sigma) * x + sigma * torch.randn_like(x)).detach()
        share = (1 - sigma) / ((1 - sigma) ** 2 + sigma**2)
        real, fake = (m + share * (noisy - (1 - sigma) * m) for m in (1.5, mean.detach()))
        optimizer.zero_grad()
        matched(x, fake, real).backward()
        optimizer.step()
    assert abs(float(mean) - 1.5) < 0.2


def test_generator_and_critic_learn_from_a_roll_out():
    model, read = network(), words()
    setup = Distillation(model, network(1).requires_grad_(False), network(2), read)
    x, text, tracks = roll(model, read, streams(model), 2, 1, warped(SMALL.steps, SMALL.shift))
    empty = read.encode([""])[:, None].detach()
    setup.generator_loss(x, tracks, text, empty).backward()
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(p.grad is None for p in setup.critic.parameters())
    model.zero_grad()
    setup.critic_loss(x.detach(), tracks, text).backward()
    assert any(p.grad is not None and p.grad.any() for p in setup.critic.parameters())
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_a_perfect_network_sees_through_any_noise():
    x, model = torch.randn(1, 6, SMALL.out_channels, *SIZE), network()
    sigma = torch.tensor([0.7])
    noise = torch.randn_like(x)
    model.forward = lambda *_: noise - x
    text, tracks = torch.zeros(1, 2, 1, SMALL.text_dim), torch.zeros(1, 6, 32, *SIZE)
    torch.testing.assert_close(seen_whole(model, 0.3 * x + 0.7 * noise, sigma, tracks, text), x, rtol=1e-4, atol=1e-5)


# -- flow matching -------------------------------------------------------------------------------------------------------


def test_levels_of_every_kind_of_step():
    random = np.random.default_rng(0)
    equal = levels(random, EQUAL, 64, 4, 3.0, 0.5)
    assert (equal == equal[:, :1]).all() and equal.shape == (64, 4)
    rising = levels(random, RISING, 64, 4, 1.0, 0.5)
    assert (rising.diff(dim=1) > 0).all()
    assert ((rising * 4).floor() == torch.arange(4)).all(), "one draw in each part"
    causal = levels(random, "causal", 2000, 4, 1.0, 1.0)
    assert (causal[:, 0] <= 0.2).all() and 0.25 < float((causal[:, 1] <= 0.2).float().mean()) < 0.9
    assert float((levels(random, "causal", 4000, 4, 3.0, 0.0) > 0.5).float().mean()) == pytest.approx(0.75, abs=0.02)


def some_clips(count=6):
    torch.manual_seed(3)
    tracks = torch.rand(count, 4 * 24, 4, 2) * 16
    tracks[:, :, 3] = float("nan")
    prompts = torch.arange(8).ge(4).long().expand(count, -1)
    texts = ["a red circle", "a blue square"]
    kinds = torch.tensor([[0, 0], [5, 1], [2, 2], [-1, -1]]).expand(count, -1, -1)
    return Clips(torch.randn(count, 24, SMALL.out_channels, *SIZE).half(), prompts, tracks, kinds, texts)


def test_cells_know_how_far_every_thing_is_at_its_nearest_frame():
    points = torch.tensor([[[2.0, 2.0], [torch.nan, torch.nan]], [[14.0, 6.0], [9.0, 9.0]]])  # two frames, two things
    far = apart(points[None], (2, 2), (2, 8, 8))
    assert far.shape == (1, 1, 2, 2, 2)
    for y in range(2):
        for x in range(2):
            centre = torch.tensor([8.0 * x + 4, 8.0 * y + 4])
            near = min(float((centre - points[n, 0]).norm()) for n in range(2))
            assert float(far[0, 0, 0, y, x]) == pytest.approx(near)
            assert float(far[0, 0, 1, y, x]) == pytest.approx(float((centre - points[1, 1]).norm()))
    assert apart(torch.full((1, 4, 1, 2), torch.nan), (2, 2), (4, 8, 8)).isinf().all()


def test_tokens_are_told_what_is_in_them():
    """With embeddings that say it outright the loss vanishes; rows whose kinds are not known do not count."""
    model = network()
    named = Named(model)
    far = torch.full((2, 1, 2, 2, 2), 99.0)
    far[:, 0, 0, 0, 1], far[:, 0, 1, 1, 0] = 1.0, 2.0
    kinds = torch.tensor([[[3, 1], [5, 2]], [[0, 0], [1, 1]]])
    colours, shapes = torch.tensor([0, 4, 6, 0]), torch.tensor([0, 2, 3, 0])  # of the first row's four tokens
    named.tokens = torch.zeros(2, 4, SMALL.dim)
    named.tokens[0, torch.arange(4), colours] = 50.0
    named.tokens[0, torch.arange(4), 16 + shapes] = 50.0
    with torch.no_grad():
        for head, first in ((named.colour, 0), (named.shape, 16)):
            head.weight.zero_(), head.bias.zero_()
            head.weight[:, first : first + len(head.weight)] = torch.eye(len(head.weight))
    assert float(named.loss(far, kinds, torch.tensor([True, False]))) < 1e-3
    assert float(named.loss(far, kinds, torch.tensor([True, True]))) > 1
    model(
        torch.randn(1, 3, SMALL.in_channels, *SIZE), torch.zeros(1, 3), model.read(words().encode(["a"])),
        Clip(model.rope, SMALL.head_dim, torch.arange(3), 2, 2, None),
    )  # fmt: skip
    assert named.tokens.shape == (1, 12, SMALL.dim), "tokens come from a hook on the middle block"


def test_a_comma_is_no_word_that_is_missing():
    assert words().unknown("a red circle, a green circle") == ["green"]


def test_words_learn_to_say_what_a_sentence_says_of_its_things(tmp_path):
    text = "a small red circle bounces and a large blue star rests over the sea"
    assert [split(text)[n] for n in nouns(text, 48)] == ["circle", "star"]
    reading.main(out=tmp_path, minutes=0.08, batch=32)
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert lines[-1]["right"] > 0.1 and load_words(tmp_path / "words.safetensors").vocabulary


@pytest.mark.parametrize("frames", [1, 3, 6])
def test_flow_matching_lowers_its_loss(monkeypatch, frames):
    monkeypatch.setattr(making, "TINY", SMALL)
    training, clips = Pretraining(SMALL, Mix(frames=frames, equal=0.2, rising=0.2), 0), some_clips()
    clips.latents[:] = clips.latents[0, 0]  # one picture, so that there is something to learn in seconds
    many = optimizers(training.transformer, 3e-3)
    losses = []
    for _ in range(60):
        told = training.loss(clips)
        told["total"].backward()
        loss = told["loss"]
        for optimizer in many:
            grown(optimizer, [], 3e-3)
        losses.append(float(loss))
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])


def partner(rank, port, folder):
    """One of two processes: gradients of their own, and a clock of their own."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    assert joined() == rank
    a, b, unused = (torch.nn.Parameter(torch.zeros(n)) for n in (3, 2, 4))
    a.grad, b.grad = torch.full((3,), 1.0 + rank), torch.tensor([rank, -rank]).float()
    shared([a, unused, b])
    assert unused.grad is None
    run = Run(folder / str(rank), 1, {}, {}, {})
    torch.save((a.grad, b.grad, agreed(10.0 + rank), run.first), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_processes_share_a_step_and_a_clock(tmp_path):
    with socket.socket() as some:
        some.bind(("127.0.0.1", 0))
        port = some.getsockname()[1]
    torch.multiprocessing.spawn(partner, (port, tmp_path), nprocs=2)
    (a, b, clock, first), (a2, b2, clock2, first2) = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert torch.equal(a, torch.full((3,), 1.5)) and torch.equal(b, torch.tensor([0.5, -0.5]))
    assert torch.equal(a, a2) and torch.equal(b, b2) and clock == clock2 == 10.0 and first and not first2


def test_a_process_alone_shares_with_nobody(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    p = torch.nn.Parameter(torch.zeros(2))
    p.grad = torch.tensor([1.0, 2.0])
    shared([p])
    assert joined() == 0 and agreed(3.0) == 3.0 and p.grad.tolist() == [1.0, 2.0]


def test_a_run_goes_on_where_it_stopped(tmp_path):
    def setup(folder):
        torch.manual_seed(0)
        layer = torch.nn.Linear(4, 4)
        run = Run(folder, 1e-9, {"layer": layer}, {"adam": torch.optim.AdamW(layer.parameters(), 0.1)},
                  {"layer": Average(layer, 0.9)})  # fmt: skip
        return layer, run

    def step(layer, run, x):
        layer(x).square().mean().backward()
        grown(run.optimizers["adam"], list(layer.parameters()), 0.1)
        run.averages["layer"].update(layer)

    xs = torch.randn(6, 3, 4)
    whole, run = setup(tmp_path / "whole")
    for x in xs:
        step(whole, run, x)
    part, first = setup(tmp_path / "part")
    for x in xs[:3]:
        step(part, first, x)
    first.save()
    rest, second = setup(tmp_path / "part")
    second.load()
    for x in xs[3:]:
        step(rest, second, x)
    assert torch.equal(whole.weight, rest.weight)
    assert torch.equal(run.averages["layer"].values["weight"], second.averages["layer"].values["weight"])


def test_a_run_logs_its_curve_and_refuses_what_is_no_number(tmp_path):
    layer = torch.nn.Linear(2, 2)
    run = Run(tmp_path, 1e-9, {"layer": layer}, {}, {})
    for figures in run.steps("toy", every=1):
        figures["loss"] = 1.0
    lines = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert lines == [{"step": 1, "seconds": 0.0, "loss": 1.0}] and run.checkpoint.exists()
    run.seconds = 0.0
    with pytest.raises(ValueError, match="lower the learning rate"):
        for figures in run.steps("toy", every=1):
            figures["loss"] = float("nan")


def test_a_damaged_checkpoint_is_refused(tmp_path):
    run = Run(tmp_path, 1, {"layer": torch.nn.Linear(2, 2)}, {}, {})
    with pytest.raises(ValueError, match="nothing to resume"):
        run.load()
    run.checkpoint.write_bytes(b"half a file")
    with pytest.raises(ValueError, match="not the whole checkpoint"):
        run.load()


# -- clips and codec -------------------------------------------------------------------------------------------------------


def test_blocks_and_back():
    frames = torch.randn(2, 8, 3, 16, 8)
    assert torch.equal(unblocked(blocks(frames)), frames)


def test_the_codec_gives_the_same_bits_however_a_stream_is_cut():
    torch.manual_seed(0)
    codec = TinyCodec(8, 12, 1)
    for parameter in codec.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    frames = torch.rand(1, 4 * 5 + 1, 3, 16, 16) * 2 - 1
    whole, _ = codec.encode(frames)
    assert whole.shape == (1, 6, 8, 4, 4)
    for cuts in ((1, 4, 5, 11), (2, 3, 6, 10), (21,)):
        state, parts, at = None, [], 0
        for n in cuts:
            z, state = codec.encode(frames[:, at : at + n], state)
            parts.append(z)
            at += n
        assert torch.equal(torch.cat(parts, 1), whole)
    pictures, _ = codec.decode(whole)
    assert pictures.shape == frames.shape
    for cuts in ((1, 5), (2, 3, 1)):
        state, parts, at = None, [], 0
        for n in cuts:
            z, state = codec.decode(whole[:, at : at + n], state)
            parts.append(z)
            at += n
        assert torch.equal(torch.cat(parts, 1), pictures)


def test_a_codec_of_half_precision_takes_any_type():
    codec = TinyCodec(8, 12, 1).bfloat16()
    z, _ = codec.encode(torch.rand(1, 5, 3, 16, 16) * 2 - 1)
    pictures, _ = codec.decode(z.float())
    assert z.dtype == pictures.dtype == torch.bfloat16


def test_components_are_orthonormal_and_latents_of_unit_size():
    codec = TinyCodec(16, 8, 1)
    films = torch.stack([fitting.whole_groups(n, 4) for n in range(4)])
    shares = fitting.components(codec, films)
    assert sum(shares) > 0.9 and sorted(shares, reverse=True) == shares
    torch.testing.assert_close(codec.basis @ codec.basis.T, torch.eye(16), atol=1e-5, rtol=0)
    error = (unblocked(codec.linear(codec.project(blocks(films)))) - films).square().mean()
    assert float(error) < 0.1 * float(films.var())
    z = codec.project(blocks(films))
    torch.testing.assert_close(z.mean((0, 1, 3, 4)), torch.zeros(16), atol=1e-3, rtol=0)
    assert float(z.square().mean()) == pytest.approx(1, abs=0.02)


def test_clips_of_films_name_the_prompt_of_every_chunk(tmp_path):
    codec = TinyCodec(16, 8, 1)
    films = [filmed(seed, 12) for seed in range(4)]
    clips = coded(films, codec)
    assert clips.latents.shape == (4, 12, 16, 16, 16) and clips.tracks.shape == (4, 48, 4, 2)
    for row, made in enumerate(films):
        for chunk, number in enumerate(clips.prompts[row].tolist()):
            first = making.first_pixel(chunk * CHUNK)
            assert clips.texts[number] == [text for start, text, _ in made.prompts if start <= first][-1]
    making.main(out=tmp_path, codec=_saved(codec, tmp_path / "codec.bin"), count=4, latents=12, shard=2, first=0)
    stock = Shards(tmp_path)
    assert len(stock) == 4 and stock.length == 12
    drawn = stock.draw(np.random.default_rng(0), 3)
    assert drawn.latents.shape[0] == 3 and drawn.prompts.max() < len(drawn.texts)


def _saved(codec, path):
    from evenflow.models.video.files import save_codec

    save_codec(codec, path)
    return path


def test_conditions_are_blank_or_tracks_of_some_things():
    random = np.random.default_rng(0)
    tracks = torch.rand(3, 8, 2, 2) * 64
    assert not conditions(random, tracks, drop=1.0).any()
    drawn = conditions(random, tracks, drop=0.0)
    assert drawn.shape == (3, 2, 32, 16, 16) and drawn.any()
    hidden = torch.full_like(tracks, float("nan"))
    assert not conditions(random, hidden, drop=0.0).any()
