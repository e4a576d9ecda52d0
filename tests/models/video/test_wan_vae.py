"""Wan's autoencoder as a stream: the same bits as the whole, however the stream is cut."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from evenflow.models.video.wan_vae import WanCodec, WanState, load_wan_codec

from .nets import noise

SHAPE = {"base_dim": 4, "z_dim": 16, "dim_mult": [1, 2, 2, 2], "num_res_blocks": 1}


def codec(**changes) -> WanCodec:
    from diffusers import AutoencoderKLWan

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return WanCodec(AutoencoderKLWan(**{**SHAPE, **changes}))


CODEC = codec()
FRAMES = noise(1, 13, 3, 32, 40).clamp(-1, 1)
LATENTS = noise(1, 4, 16, 4, 5, seed=1)


def mean_and_std(config):
    return (torch.tensor(one)[:, None, None, None] for one in (config.latents_mean, config.latents_std))


def whole_encode(codec: WanCodec, frames):
    mean, std = mean_and_std(codec.vae.config)
    return ((codec.vae.encode(frames.transpose(1, 2)).latent_dist.mode() - mean) / std).transpose(1, 2)


def whole_decode(codec: WanCodec, latents):
    mean, std = mean_and_std(codec.vae.config)
    return codec.vae.decode(latents.transpose(1, 2) * std + mean).sample.transpose(1, 2)


def in_pieces(step, x, cuts):
    state, parts, sizes = None, [], [b - a for a, b in itertools.pairwise([0, *sorted(cuts), x.shape[1]])]
    for part in x.split(sizes, 1):
        out, state = step(part, state)
        parts.append(out)
    return torch.cat(parts, 1)


def test_the_normalisation_is_that_of_wan():
    mean, std = mean_and_std(CODEC.vae.config)
    assert mean.flatten().tolist() == pytest.approx(
        [-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508, 0.4134, -0.0715, 0.5517, -0.3632, -0.1922,
         -0.9497, 0.2503, -0.2921]
    )  # fmt: skip
    assert std.flatten().tolist() == pytest.approx(
        [2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743, 3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253,
         2.8251, 1.9160]
    )  # fmt: skip


@pytest.mark.parametrize("batch", [1, 2])
def test_point_7_whole_calls_are_those_of_diffusers(batch):
    frames, latents = noise(batch, 9, 3, 40, 32, seed=2).clamp(-1, 1), noise(batch, 3, 16, 5, 4, seed=3)
    assert torch.equal(CODEC.encode(frames)[0], whole_encode(CODEC, frames))
    assert torch.equal(CODEC.decode(latents)[0], whole_decode(CODEC, latents))


@settings(max_examples=15)
@given(st.lists(st.integers(0, 13), max_size=5), st.sets(st.integers(1, 3)))
def test_point_7_any_cut_gives_the_same_bits(frame_cuts, latent_cuts):
    assert torch.equal(in_pieces(CODEC.encode, FRAMES, frame_cuts), whole_encode(CODEC, FRAMES))
    assert torch.equal(in_pieces(CODEC.decode, LATENTS, latent_cuts), whole_decode(CODEC, LATENTS))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_point_7_as_many_frames_as_wan_has(count):
    frames, state = CODEC.decode(noise(1, count, 16, 2, 2))
    assert frames.shape == (1, 4 * (count - 1) + 1, 3, 16, 16) and state.begun == count
    assert frames.abs().max() <= 1
    assert CODEC.encode(frames)[0].shape == (1, count, 16, 2, 2)


def test_point_7_tiny_latents_differ_by_rounding_at_most():
    """Below 16 latent pixels a 1×1×1 convolution of torch rounds by how many frames it sees; any cut is still the same."""
    frames, latents = noise(1, 9, 3, 16, 24).clamp(-1, 1), noise(1, 3, 16, 2, 3)
    for step, whole, x in ((CODEC.encode, whole_encode, frames), (CODEC.decode, whole_decode, latents)):
        assert torch.equal(in_pieces(step, x, [1, 2]), step(x)[0])
        assert (step(x)[0] - whole(CODEC, x)).abs().max() < 1e-4


def test_streams_do_not_know_of_each_other_and_a_state_may_be_kept():
    other = noise(1, 4, 16, 4, 5, seed=9)
    expected = whole_decode(CODEC, LATENTS), whole_decode(CODEC, other)
    states, parts = [None, None], [[], []]
    for n in range(4):
        for stream, latents in enumerate((LATENTS, other)):
            out, states[stream] = CODEC.decode(latents[:, n : n + 1], states[stream])
            parts[stream].append(out)
    assert all(torch.equal(torch.cat(part, 1), whole) for part, whole in zip(parts, expected, strict=True))
    first, kept = CODEC.decode(LATENTS[:, :2])
    before = {number: tensor.clone() for number, tensor in kept.features.items()}
    for _ in range(2):  # going on twice from one state
        assert torch.equal(torch.cat([first, CODEC.decode(LATENTS[:, 2:], kept)[0]], 1), expected[0])
    assert all(torch.equal(kept.features[number], tensor) for number, tensor in before.items())


def test_what_a_state_keeps_is_as_published():
    """Of the decoder's 33 causal convolutions all but a shortcut remember something, of the encoder's 26 all but two."""
    from diffusers import AutoencoderKLWan

    full = WanCodec(AutoencoderKLWan(base_dim=4))
    frames, decoded = full.decode(noise(1, 2, 16, 2, 2))
    _, encoded = full.encode(frames)
    assert len(decoded.features) == 33 - 1 and len(encoded.features) == 26 - 2
    assert {kept.shape[2] for kept in decoded.features.values()} <= {1, 2}


def test_halves_of_the_picture_may_be_patched_as_in_wan_2_2():
    larger = codec(
        is_residual=True, in_channels=12, out_channels=12, patch_size=2, scale_factor_spatial=16, dim_mult=[1, 2, 2, 2],
    )  # fmt: skip
    frames, latents = noise(1, 9, 3, 64, 64).clamp(-1, 1), noise(1, 3, 16, 4, 4)
    assert torch.equal(in_pieces(larger.encode, frames, [2, 7]), whole_encode(larger, frames))
    assert torch.equal(in_pieces(larger.decode, latents, [1]), whole_decode(larger, latents))


def test_wrong_shapes_are_refused_and_the_stream_goes_on():
    _, state = CODEC.decode(LATENTS[:, :1])
    for bad in (noise(1, 1, 15, 4, 5), noise(2, 1, 16, 4, 5), noise(1, 1, 16, 4, 4), noise(1, 0, 16, 4, 5)):
        with pytest.raises(ValueError, match=r"expected|another stream"):
            CODEC.decode(bad, state)
    with pytest.raises(ValueError, match="multiples of 8"):
        CODEC.encode(noise(1, 1, 3, 12, 16))
    _, state = CODEC.encode(FRAMES[:, :2])
    with pytest.raises(ValueError, match="another stream"):
        CODEC.encode(noise(1, 1, 3, 16, 16), state)
    assert torch.equal(CODEC.encode(FRAMES[:, 2:5], state)[0], whole_encode(CODEC, FRAMES[:, :5])[:, 1:])
    assert isinstance(state, WanState)


def test_it_is_loaded_from_either_layout(tmp_path):
    from diffusers import AutoencoderKLWan

    CODEC.vae.save_pretrained(tmp_path / "vae")
    loaded = load_wan_codec(tmp_path / "vae")
    assert torch.equal(loaded.decode(LATENTS)[0], CODEC.decode(LATENTS)[0])
    assert load_wan_codec(tmp_path / "vae", torch.bfloat16).dtype == torch.bfloat16
    weights = CODEC.vae.state_dict()
    del weights["decoder.conv_out.bias"]
    save_file(weights, tmp_path / "vae" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match=r"missing: 1 of \d+: decoder\.conv_out\.bias"):
        load_wan_codec(tmp_path / "vae")
    with torch.device("meta"):
        full = AutoencoderKLWan().state_dict()
    torch.save({"encoder.conv1.weight": torch.ones(2)}, tmp_path / "Wan2.1_VAE.pth")
    with pytest.raises(ValueError, match=rf"missing: {len(full) - 1} of {len(full)}"):
        load_wan_codec(tmp_path / "Wan2.1_VAE.pth")


def own_names() -> list[str]:
    """The tensors of Wan2.1_VAE.pth, as its network is built."""
    two, norm = ("weight", "bias"), ("gamma",)

    def residual(at: str, shortcut: bool = False) -> list[str]:
        parts = {"residual.0": norm, "residual.2": two, "residual.3": norm, "residual.6": two}
        return [
            f"{at}.{part}.{one}"
            for part, ones in (parts | ({"shortcut": two} if shortcut else {})).items()
            for one in ones
        ]

    def plain(*at: str) -> list[str]:
        return [f"{one}.{kind}" for one in at for kind in two]

    names = plain("conv1", "conv2", "encoder.conv1", "decoder.conv1", "encoder.head.2", "decoder.head.2")
    for half in ("encoder", "decoder"):
        names += [*residual(f"{half}.middle.0"), *residual(f"{half}.middle.2"), f"{half}.head.0.gamma"]
        names += [f"{half}.middle.1.norm.gamma", *plain(f"{half}.middle.1.to_qkv", f"{half}.middle.1.proj")]
    for kind, wider, sampling, blocks in (
        ("encoder.downsamples", (3, 6), {2: False, 5: True, 8: True}, 11),
        ("decoder.upsamples", (4,), {3: True, 7: True, 11: False}, 15),
    ):
        for n in range(blocks):
            if n not in sampling:
                names += residual(f"{kind}.{n}", n in wider)
            else:
                names += plain(f"{kind}.{n}.resample.1", *([f"{kind}.{n}.time_conv"] if sampling[n] else []))
    return names


def test_the_file_of_wan_holds_this_network():
    """Its names, led through the converter, are those of the full network, none left over and none missing."""
    from diffusers import AutoencoderKLWan
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    with torch.device("meta"):
        full = AutoencoderKLWan().state_dict()
    made = convert_wan_vae_to_diffusers({name: torch.empty(0) for name in own_names()})
    assert made.keys() == full.keys()
