"""Wan's text: umT5 rows up to a prompt's end, zeros behind, from either layout of the encoder's weights."""

import math

import pytest
import torch
from safetensors.torch import save_file

from evenflow.models.video import umt5
from evenflow.models.video.umt5 import OWN, UMT5, clean, from_wan, load_umt5

LENGTH = 9
WORDS = ["<pad>", "</s>", "<unk>", "a", "red", "ball", "rolls", "left", "&", "blue", "sky"]
SHAPE = {"vocab_size": 16, "d_model": 12, "d_kv": 4, "d_ff": 20, "num_layers": 2, "num_heads": 3, "feed_forward_proj": "gated-gelu"}  # fmt: skip


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({word: n for n, word in enumerate(WORDS)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def encoder():
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = UMT5EncoderModel(UMT5Config(**SHAPE))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.4)
    return model


ENCODER, TOKENIZER = encoder(), tokenizer()


@pytest.fixture
def text():
    return UMT5(ENCODER, TOKENIZER, LENGTH)


def test_rows_behind_a_prompt_are_zero_and_the_others_are_its_own(text):
    prompts = ["a red ball rolls left", "sky", ""]
    out = text(prompts)
    assert out.shape == (3, LENGTH, 12)
    for row, count in zip(out, (6, 2, 1), strict=True):  # the end token is part of a prompt
        assert (row[count:] == 0).all() and (row[:count].abs().amax(1) > 0).all()
    # As pipelines do it: padded to the full length, with a mask, then cut.
    padded = TOKENIZER(prompts, padding="max_length", max_length=LENGTH, return_tensors="pt")
    full = ENCODER(padded.input_ids, padded.attention_mask).last_hidden_state * padded.attention_mask[..., None]
    assert (out - full).abs().max() < 1e-5


def test_a_prompt_is_read_once_and_the_same_in_any_company(text, monkeypatch):
    calls = []
    inner = ENCODER.forward
    monkeypatch.setattr(ENCODER, "forward", lambda ids, **more: (calls.append(ids.tolist()), inner(ids, **more))[1])
    both = text(["a red ball", "blue sky"])
    assert torch.equal(text(["blue sky", "a  red ball\n", "blue sky"]), both[[1, 0, 1]])  # white space counts once
    assert len(calls) == 2
    monkeypatch.setattr(umt5, "KEPT", 2)
    text(["sky"])  # the prompt that was asked for longest ago is forgotten
    text(["a red ball"])
    assert len(calls) == 3
    text(["blue sky"])
    assert len(calls) == 4


def test_what_is_kept_cannot_be_written_to_from_outside(text):
    first = text(["a red ball"])
    first.zero_()
    assert text(["a red ball"]).abs().max() > 0


def test_a_long_prompt_is_cut_with_a_warning(text):
    with pytest.warns(UserWarning, match="longer than 9 tokens"):
        out = text(["a red ball rolls left a blue sky a ball"])
    assert (out[0].abs().amax(1) > 0).all()
    assert text(["a red ball rolls left a blue sky"]).shape == (1, LENGTH, 12)  # exactly as many: no warning


def test_prompts_are_cleaned():
    assert clean("  a\tred \n ball &amp;amp; sky ") == "a red ball & sky"
    assert clean("the sky\u00e2\u20ac\u2122s blue") == "the sky's blue"  # UTF-8 that was read as another encoding


@pytest.mark.parametrize("bad", ["a red ball", [], [1]])
def test_anything_but_a_list_of_strings_is_refused(text, bad):
    with pytest.raises(TypeError, match="list of one string or more"):
        text(bad)


def own_weights():
    """The encoder's tensors under Wan's names."""
    back = {theirs: ours for ours, theirs in OWN.items()}
    found = {}
    for name, tensor in ENCODER.state_dict().items():
        if name == "shared.weight":
            found["token_embedding.weight"] = tensor
        elif name == "encoder.final_layer_norm.weight":
            found["norm.weight"] = tensor
        elif name.startswith("encoder.block."):
            number, _, rest = name.removeprefix("encoder.block.").removesuffix(".weight").partition(".")
            found[f"blocks.{number}.{back[rest]}.weight"] = tensor
    return found


def restated(weights, ids):
    """T5's encoder by its definition (arXiv 1910.10683; every layer has position biases of its own, arXiv 2304.09151)."""

    def norm(x, name):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weights[name + ".weight"]

    def bucket(apart):  # key − query; half of the 32 buckets for each direction, exact up to 8, then logarithmic to 128
        far, side = abs(apart), 16 * (apart > 0)
        return side + (far if far < 8 else min(8 + int(math.log(far / 8) / math.log(16) * 8), 15))

    x, n = weights["token_embedding.weight"][ids], len(ids)
    buckets = torch.tensor([[bucket(key - query) for key in range(n)] for query in range(n)])
    for layer in range(SHAPE["num_layers"]):
        at = f"blocks.{layer}."
        h = norm(x, at + "norm1")
        q, k, v = ((h @ weights[f"{at}attn.{one}.weight"].T).reshape(n, 3, 4).transpose(0, 1) for one in "qkv")
        bias = weights[at + "pos_embedding.embedding.weight"][buckets].permute(2, 0, 1)
        seen = torch.softmax(q @ k.transpose(1, 2) + bias, -1) @ v
        x = x + seen.transpose(0, 1).reshape(n, 12) @ weights[at + "attn.o.weight"].T
        h = norm(x, at + "norm2")
        gate = torch.nn.functional.gelu(h @ weights[at + "ffn.gate.0.weight"].T, approximate="tanh")
        x = x + (h @ weights[at + "ffn.fc1.weight"].T * gate) @ weights[at + "ffn.fc2.weight"].T
    return norm(x, "norm")


def test_the_encoder_is_t5_under_the_names_of_wan(text):
    prompt = "a red ball rolls left a sky"
    ids = TOKENIZER(prompt).input_ids
    assert (text([prompt])[0, : len(ids)] - restated(own_weights(), torch.tensor(ids))).abs().max() < 1e-4


def test_it_is_loaded_from_either_layout(tmp_path, monkeypatch, text):
    ENCODER.save_pretrained(tmp_path / "text_encoder")
    TOKENIZER.save_pretrained(tmp_path / "tokenizer")
    loaded = load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer", length=LENGTH)
    assert torch.equal(loaded(["a red ball"]), text(["a red ball"]))
    half = load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer", length=LENGTH, dtype=torch.bfloat16)
    assert half(["sky"]).dtype == torch.bfloat16
    torch.save(own_weights(), tmp_path / "models_t5_umt5-xxl-enc-bf16.pth")
    monkeypatch.setattr(umt5, "XXL", SHAPE)
    own = load_umt5(tmp_path / "models_t5_umt5-xxl-enc-bf16.pth", tmp_path / "tokenizer", length=LENGTH)
    assert torch.equal(own(["a red ball"]), text(["a red ball"]))
    assert from_wan({"other.weight": torch.ones(1)}).keys() == {"other.weight"}


def test_what_is_missing_is_told(tmp_path):
    ENCODER.save_pretrained(tmp_path / "text_encoder")
    with pytest.raises(ValueError, match="no tokenizer"):
        load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer")
    weights = own_weights()
    del weights["norm.weight"]
    save_file({"shared.weight": torch.ones(16, 12)}, tmp_path / "text_encoder" / "model.safetensors")
    with pytest.raises(ValueError, match="missing: "):
        load_umt5(tmp_path / "text_encoder", tmp_path / "tokenizer")


def test_the_full_shape_is_that_of_umt5_xxl():
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.device("meta"):
        full = UMT5EncoderModel(UMT5Config(**umt5.XXL))
    assert sum(p.numel() for p in full.parameters()) == 5_680_910_336
