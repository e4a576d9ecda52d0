"""A whole model from a folder of either layout, from a file with a base, from the hub; untrained ones of any shape."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from evenflow.models.video import load_video, random_model
from evenflow.models.video.loading import HUB, located, parts_of
from evenflow.models.video.names import to_diffusers

from .conftest import LOADED as SMALL
from .conftest import NETWORK
from .nets import network, noise
from .test_wan_vae import CODEC


def runs(model, like=NETWORK) -> None:
    """It is the whole model: every part does what the original does."""
    ours = model.transformer.state_dict()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in like.state_dict().items())
    latents = noise(1, 2, 16, 4, 4)
    assert torch.equal(model.codec.decode(latents)[0], CODEC.decode(latents)[0])
    text = model.encode_text(["a red ball"])
    assert text.shape == (1, 512, 12) and (text[0, 4:] == 0).all() and text[0, :4].abs().min() > 0


def test_a_folder_in_the_layout_of_diffusers(folder):
    model = load_video(folder)
    runs(model)
    assert model.config == replace(SMALL, name=str(folder)) and model.transformer.config == model.config
    assert len(model.notes) == 4
    half = load_video(str(folder), "bfloat16")
    assert {p.dtype for p in half.transformer.parameters()} == {half.codec.dtype} == {torch.bfloat16}
    assert half.encode_text(["sky"]).dtype == torch.bfloat16


def test_a_file_with_a_base_that_completes_it(folder, tmp_path):
    other = network(SMALL, seed=1)
    torch.save({"generator_ema": {f"model.{n}": t for n, t in other.state_dict().items()}}, tmp_path / "dmd.pt")
    runs(load_video(tmp_path / "dmd.pt", base=folder, config=SMALL), like=other)
    with pytest.raises(ValueError, match=r"no autoencoder.*no text encoder.*no tokenizer.*base="):
        load_video(tmp_path / "dmd.pt", config=SMALL)


def test_the_layout_of_wan(folder, tmp_path, monkeypatch):
    (tmp_path / "google" / "umt5-xxl").mkdir(parents=True)
    for name in ("Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth", "diffusion_pytorch_model.safetensors"):
        (tmp_path / name).touch()
    found = parts_of(tmp_path)
    assert {name: place.name for name, place in found.items()} == {
        "transformer": "diffusion_pytorch_model.safetensors", "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth", "tokenizer": "umt5-xxl",
    }  # fmt: skip
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").touch()
    assert parts_of(tmp_path)["transformer"] == tmp_path  # in shards: the folder of the index


def test_parts_that_do_not_belong_together_are_refused(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "mixed")
    wrong = replace(SMALL, text_dim=20)
    save_file(to_diffusers(network(wrong).state_dict()), place / "transformer" / "diffusion_pytorch_model.safetensors")
    told = json.loads((place / "transformer" / "config.json").read_text())
    (place / "transformer" / "config.json").write_text(json.dumps(told | {"text_dim": 20}))
    with pytest.raises(ValueError, match="gives 12 numbers a word, not 20"):
        load_video(place)
    five = replace(SMALL, in_channels=5, out_channels=5)
    save_file(to_diffusers(network(five).state_dict()), place / "transformer" / "diffusion_pytorch_model.safetensors")
    (place / "transformer" / "config.json").write_text(json.dumps(told | {"in_channels": 5, "out_channels": 5}))
    with pytest.raises(ValueError, match="16 channels, the transformer 5"):
        load_video(place)


def test_a_missing_part_is_named(folder, tmp_path):
    place = shutil.copytree(folder, tmp_path / "less", ignore=shutil.ignore_patterns("vae"))
    with pytest.raises(ValueError, match=r"holds no autoencoder \(vae/"):
        load_video(place)
    runs(load_video(place, base=folder))


# -- the hub ---------------------------------------------------------------------------------------------------------


def test_a_name_is_fetched_from_the_hub(folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **how: (asked.append(name), str(folder))[1])
    torch.save(NETWORK.state_dict(), tmp_path / "w.pt")
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file: (asked.append((name, file)), str(tmp_path / "w.pt"))[1]
    )
    runs(load_video("someone/something"))
    runs(load_video("someone/else/checkpoints/w.pt", base="someone/something", config=SMALL))
    assert located("wan2.1-1.3b") == folder
    assert asked == [
        "someone/something", ("someone/else", "checkpoints/w.pt"), "someone/something", HUB["wan2.1-1.3b"]
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["wan2.1-14b", "someone/something", "someone/something/w.pt"])
def test_offline_it_is_said_what_to_do(name):
    with pytest.raises(ValueError, match=r"cannot be had from the hub .*hf download .*--local-dir FOLDER"):
        load_video(name)


@pytest.mark.parametrize("name", ["nothing", "./some/thing", "/no/such/folder", "wan2.1-2b", "some/"])
def test_what_is_neither_path_nor_name_is_refused(name):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder.*wan2\.1-1\.3b"):
        load_video(name)


@pytest.mark.parametrize("dtype", ["int8", "nonsense", torch.int64, 3])
def test_a_wrong_dtype_is_refused(dtype):
    with pytest.raises(ValueError, match="floating point"):
        load_video("tiny", dtype)


# -- untrained -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stride", [(4, 4, 4), (4, 8, 8)])
def test_untrained_models_have_any_shape_and_are_drawn_by_their_seed(stride):
    config = replace(SMALL, stride=stride, size=(64, 64), text_len=9)
    model, same, other = (random_model(config, seed, vae_dim=4) for seed in (3, 3, 4))
    for a, b, c in zip(*(m.transformer.parameters() for m in (model, same, other)), strict=True):
        assert torch.equal(a, b) and (a.ndim < 2 or not torch.equal(a, c))
    latents = noise(1, 2, 16, *config.latent_size())
    frames, _ = model.codec.decode(latents)
    assert frames.shape == (1, 5, 3, 64, 64) and torch.equal(frames, same.codec.decode(latents)[0])
    assert model.codec.encode(frames)[0].shape == latents.shape
    text = model.encode_text(["one two", "one"])
    assert text.shape == (2, 9, 12) and (text[0, 3:] == 0).all() and not torch.equal(text[0], text[1])
    assert torch.equal(text, other.encode_text(["one two", "one"]))
    attended = model.transformer.read(text[:1])
    x = noise(1, 1, 16, *config.latent_size())
    v = model.transformer(x, torch.tensor([[500.0]]), attended, lambda layer, q, k, v: v)
    assert 0.1 < v.std() < 10


def test_untrained_models_of_other_strides_are_refused():
    with pytest.raises(ValueError, match="codec of"):
        random_model(replace(SMALL, stride=(4, 16, 16)))
    with pytest.raises(ValueError, match=r"no preset .*wan2\.1-14b"):
        random_model("huge")


def test_nothing_of_diffusers_is_imported_before_it_is_needed():
    code = """
import sys, evenflow, evenflow.models.video
from evenflow.models.video import random_model
random_model("tiny")
assert not {"diffusers", "av", "ftfy"} & sys.modules.keys(), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
