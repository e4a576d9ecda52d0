"""Weights from files: every published layout, the same network each time, and nothing that is not whole."""

import json
import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from evenflow.models.video import PRESETS, VideoTransformer
from evenflow.models.video.checkpoints import config_of, fill, load_transformer, misfits, read_weights
from evenflow.models.video.names import bare, from_diffusers, native, to_diffusers

from .nets import SMALL, network, theirs

WEIGHTS = network().state_dict()


def same(model) -> bool:
    ours = model.state_dict()
    return ours.keys() == WEIGHTS.keys() and all(torch.equal(ours[name], WEIGHTS[name]) for name in WEIGHTS)


def prefixed(prefix: str, weights=WEIGHTS):
    return {prefix + name: tensor for name, tensor in weights.items()}


def fsdp(weights=WEIGHTS):
    """As a sharded model names them: the whole is wrapped, and so is every block."""
    return {
        "model._fsdp_wrapped_module." + name.replace("blocks.0.", "blocks.0._fsdp_wrapped_module."): tensor
        for name, tensor in weights.items()
    }


OTHER = {name: tensor + 1 for name, tensor in WEIGHTS.items()}
LAYOUTS = {
    "plain": WEIGHTS,
    "diffusers": to_diffusers(WEIGHTS),
    "model": prefixed("model."),
    "module": prefixed("module.model."),
    "fsdp": fsdp(),
    "generator": {"generator": prefixed("model.")},
    "self-forcing": {"generator": prefixed("model.", OTHER), "generator_ema": prefixed("model.")},
    "training": {"generator": OTHER, "critic": OTHER, "generator_ema": fsdp(), "step": 600},
    "state dict": {"state_dict": WEIGHTS, "epoch": 3},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".pth"])
def test_every_layout_of_torch_gives_the_same_network(tmp_path, layout, suffix):
    torch.save(LAYOUTS[layout], tmp_path / f"w{suffix}")
    assert same(load_transformer(tmp_path / f"w{suffix}", SMALL))
    assert same(load_transformer(tmp_path, SMALL))  # the only file of its folder


@pytest.mark.parametrize("layout", ["plain", "diffusers", "model", "fsdp"])
def test_safetensors_whole_and_in_shards(tmp_path, layout):
    weights = LAYOUTS[layout]
    save_file(weights, tmp_path / "one.safetensors")
    assert same(load_transformer(tmp_path / "one.safetensors", SMALL))
    assert same(load_transformer(sharded(tmp_path / "shards", weights), SMALL))


def sharded(folder, weights, count=3):
    folder.mkdir()
    where = {}
    for shard in range(count):
        part = dict(list(weights.items())[shard::count])
        file = f"diffusion_pytorch_model-{shard + 1:05}-of-{count:05}.safetensors"
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def test_one_of_several_networks_may_be_chosen(tmp_path):
    torch.save({"generator": OTHER, "critic": WEIGHTS}, tmp_path / "w.pt")
    assert same(load_transformer(tmp_path / "w.pt", SMALL, part="critic"))
    assert not same(load_transformer(tmp_path / "w.pt", SMALL))
    with pytest.raises(ValueError, match=r"no 'generator_ema'; it holds generator, critic"):
        load_transformer(tmp_path / "w.pt", SMALL, part="generator_ema")
    save_file(prefixed("generator_ema.model.") | prefixed("generator.", OTHER), tmp_path / "w.safetensors")
    assert same(load_transformer(tmp_path / "w.safetensors", SMALL))


def test_a_folder_in_the_layout_of_diffusers_tells_its_configuration(tmp_path):
    other = theirs(SMALL)
    other.load_state_dict(to_diffusers(WEIGHTS))
    other.save_pretrained(tmp_path / "transformer")
    model = load_transformer(tmp_path / "transformer")
    assert same(model)
    assert model.config == replace(SMALL, name="transformer", text_len=model.config.text_len)


def test_the_own_layout_of_wan_tells_its_configuration(tmp_path):
    save_file(WEIGHTS, tmp_path / "diffusion_pytorch_model.safetensors")
    told = {
        "_class_name": "WanModel", "dim": 48, "eps": 1e-6, "ffn_dim": 80, "freq_dim": 32, "in_dim": 5, "model_type": "t2v",
        "num_heads": 4, "num_layers": 3, "out_dim": 5, "text_len": 7,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(told))
    with pytest.raises(ValueError, match=r"text_embedding\.0\.weight is \(48, 20\), expected \(48, 4096\)"):
        load_transformer(tmp_path)  # Wan's file tells no width of the text: it is always 4096 there
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet"}))
    with pytest.raises(ValueError, match="UNet"):
        load_transformer(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "WanModel", "dim": 48}))
    with pytest.raises(ValueError, match="lacks"):
        load_transformer(tmp_path)


def test_a_half_precision_file_keeps_its_type_and_any_is_given_on_request(tmp_path):
    torch.save({name: tensor.bfloat16() for name, tensor in WEIGHTS.items()}, tmp_path / "w.pt")
    assert next(load_transformer(tmp_path, SMALL).parameters()).dtype == torch.bfloat16
    assert next(load_transformer(tmp_path, SMALL, dtype=torch.float64).parameters()).dtype == torch.float64
    # One model has one type, though files may keep norms and modulation wider.
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in WEIGHTS.items()}
    save_file(mixed, tmp_path / "w.safetensors")
    kinds = {p.dtype for p in load_transformer(tmp_path / "w.safetensors", SMALL).parameters()}
    assert kinds == {torch.bfloat16}


def test_what_is_taken_over_is_let_go():
    model, weights = VideoTransformer(SMALL), dict(WEIGHTS)
    fill(model, weights, "here")
    assert not weights and same(model) and not any(p.requires_grad for p in model.parameters())
    assert model.head.head.bias.data_ptr() == WEIGHTS["head.head.bias"].data_ptr()  # as it was: nothing to copy
    weights = without(WEIGHTS, "head.head.bias")
    with pytest.raises(ValueError, match="here does not hold"):
        fill(model, weights, "here")
    assert len(weights) == len(WEIGHTS) - 1


def test_eight_bits_are_for_storage_only(tmp_path):
    small = {name: tensor.to(torch.float8_e4m3fn) for name, tensor in WEIGHTS.items()}
    save_file(small, tmp_path / "w.safetensors")
    model = load_transformer(tmp_path / "w.safetensors", SMALL)
    assert next(model.parameters()).dtype == torch.bfloat16
    assert torch.equal(model.state_dict()["head.head.weight"], small["head.head.weight"].bfloat16())
    save_file(WEIGHTS | {"head.head.weight": torch.ones(20, 48, dtype=torch.int8)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"whole numbers where weights belong.*head\.head\.weight"):
        load_transformer(tmp_path / "w.safetensors", SMALL)


def test_names_go_both_ways():
    there = to_diffusers(WEIGHTS)
    assert there.keys() == theirs(SMALL).state_dict().keys()
    back = from_diffusers(there)
    assert list(back) == list(WEIGHTS) and all(back[name] is WEIGHTS[name] for name in WEIGHTS)
    assert native(prefixed("model.", there)).keys() == WEIGHTS.keys()
    with pytest.raises(ValueError, match=r"two tensors are head\.head\.bias"):
        bare({"head.head.bias": torch.ones(1), "model.head.head.bias": torch.ones(1)})


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_the_networks_of_diffusers(name):
    config = PRESETS[name]
    with torch.device("meta"):
        model, other = VideoTransformer(config), theirs(config)
    ours = to_diffusers(model.state_dict())
    assert not misfits({key: tuple(tensor.shape) for key, tensor in other.state_dict().items()}, ours)
    count = sum(p.numel() for p in model.parameters())
    assert count == sum(p.numel() for p in other.parameters())
    assert config_of(model.state_dict()) == config
    published = {"wan2.1-1.3b": 1_418_996_800, "wan2.1-14b": 14_288_491_584}
    assert count == published.get(name, count)


# -- what is refused -------------------------------------------------------------------------------------------------


def without(weights, *names):
    return {name: tensor for name, tensor in weights.items() if name not in names}


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        (without(WEIGHTS, "blocks.1.ffn.0.bias"), r"missing: 1 of \d+: blocks\.1\.ffn\.0\.bias"),
        (WEIGHTS | {"blocks.0.cross_attn.k_img.weight": torch.ones(1)}, r"not known: 1 of \d+: blocks\.0\.cross_attn\.k_img"),
        (WEIGHTS | {"head.head.bias": torch.ones(4)}, r"wrong shape: 1 of \d+: head\.head\.bias is \(4,\), expected \(20,\)"),
        ({"conv.weight": torch.ones(1)}, r"missing: \d+ of"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_listed(tmp_path, weights, said):
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=said):
        load_transformer(tmp_path / "w.safetensors", SMALL)


def test_long_lists_are_cut(tmp_path):
    save_file(without(WEIGHTS, *list(WEIGHTS)[:40]), tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"missing: 40 of \d+: .*and 34 more"):
        load_transformer(tmp_path / "w.safetensors", SMALL)


def test_a_lost_shard_is_noticed(tmp_path):
    folder = sharded(tmp_path / "shards", WEIGHTS)
    victim = folder / "diffusion_pytorch_model-00002-of-00003.safetensors"
    kept = victim.read_bytes()
    victim.unlink()
    with pytest.raises(ValueError, match=r"lacks 1 of its shards: diffusion_pytorch_model-00002"):
        load_transformer(folder, SMALL)
    save_file({"head.head.bias": torch.ones(1)}, victim)
    with pytest.raises(ValueError, match=r"lacks \d+ of its tensors"):
        load_transformer(folder, SMALL)
    victim.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_transformer(folder, SMALL)
    next(folder.glob("*.json")).write_text("{}")
    with pytest.raises(ValueError, match="weight_map"):
        load_transformer(folder, SMALL)


def test_a_file_that_could_run_programs_is_not_read(tmp_path):
    file = tmp_path / "w.pt"
    touched = tmp_path / "touched"

    class Trap:
        def __reduce__(self):
            return touched.touch, ()

    torch.save({"generator": Trap()}, file)
    with pytest.raises(ValueError, match="more than tensors"):
        read_weights(file)
    file.write_bytes(pickle.dumps({"generator": Trap()}))
    with pytest.raises(ValueError, match=r"more than tensors|no file of torch"):
        read_weights(file)
    assert not touched.exists()


def test_what_is_no_file_of_weights_is_told(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_weights(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no weights"):
        read_weights(tmp_path)
    for name, content, said in (
        ("a.bin", b"x", "ends in"),
        ("a.pt", b"x", "damaged"),
        ("a.safetensors", b"x", "damaged"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=said):
            read_weights(tmp_path / name)
    with pytest.raises(ValueError, match="several files"):
        read_weights(tmp_path)
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(ValueError, match="holds a list"):
        read_weights(tmp_path / "list.pt")
    torch.save({"step": 1}, tmp_path / "none.pt")
    with pytest.raises(ValueError, match="no tensors"):
        read_weights(tmp_path / "none.pt")


def test_a_network_that_no_preset_describes_needs_a_configuration(tmp_path):
    save_file(WEIGHTS, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match=r"dim 48, 3 layers.*config="):
        load_transformer(tmp_path / "w.safetensors")
    save_file({"conv.weight": torch.ones(1)}, tmp_path / "w.safetensors")
    with pytest.raises(ValueError, match="no weights of a Wan transformer"):
        load_transformer(tmp_path / "w.safetensors")
