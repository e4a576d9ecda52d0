"""Which models open, from where, and why others are refused."""

import gc
import json
import weakref

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

import evenflow as ef
from evenflow.models import Unsupported, load, tiny_path
from evenflow.models import decoder as decoder_module
from evenflow.models.fingerprint import fingerprint

from .. import oracles
from . import zoo
from .test_writing import tokenizer

SPEC = "streaming-llm(sink=3, window=8)"


def config(name: str, **options):
    return getattr(transformers, f"{name}Config")(vocab_size=zoo.VOCABULARY, **options)


SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}


def t5():
    return transformers.T5ForConditionalGeneration(config("T5", d_model=32, d_ff=32, num_layers=1, num_heads=4, d_kv=8))


def gpt2():
    return transformers.GPT2LMHeadModel(config("GPT2", n_embd=32, n_layer=2, n_head=4, n_positions=64))


def opt():
    return transformers.OPTForCausalLM(
        config("OPT", hidden_size=32, ffn_dim=32, num_hidden_layers=2, num_attention_heads=4, word_embed_proj_dim=32,
               max_position_embeddings=64)
    )  # fmt: skip


def deepseek():
    return transformers.DeepseekV3ForCausalLM(
        config("DeepseekV3", **SIZES, num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
               qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, first_k_dense_replace=2,
               n_group=1, topk_group=1, moe_intermediate_size=16)
    )  # fmt: skip


def mamba():
    return transformers.MambaForCausalLM(config("Mamba", hidden_size=32, num_hidden_layers=2, state_size=4))


def jamba():
    return transformers.JambaForCausalLM(
        config("Jamba", **SIZES, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4,
               num_experts=2, use_mamba_kernels=False)
    )  # fmt: skip


def lfm2():
    return transformers.Lfm2ForCausalLM(
        config("Lfm2", **SIZES, num_key_value_heads=2, layer_types=["conv", "full_attention"])
    )


def matrices_only():
    return transformers.Qwen3NextForCausalLM(
        config("Qwen3Next", **SIZES, num_key_value_heads=2, head_dim=8, num_experts=2, num_experts_per_tok=1,
               moe_intermediate_size=16, shared_expert_intermediate_size=16, layer_types=["linear_attention"] * 2)
    )  # fmt: skip


def gptj():
    return transformers.GPTJForCausalLM(config("GPTJ", n_embd=32, n_layer=2, n_head=4, rotary_dim=4, n_positions=64))


def bare():
    return transformers.LlamaModel(config("Llama", **SIZES))


REFUSED = {
    "encoder-decoder": (t5, "encoder-decoder"),
    "learned positions (GPT-2)": (gpt2, "one embedding per absolute position"),
    "learned positions (OPT)": (opt, "one embedding per absolute position"),
    "latent attention": (deepseek, "latent attention"),
    "state space": (mamba, "layers of type linear_attention"),
    "hybrid": (jamba, "layers of type|ask the attention interface"),
    "convolutions": (lfm2, "layers of type conv"),
    "linear attention": (matrices_only, "layers of type linear_attention only"),
    "positions nobody tells": (gptj, "how it places tokens|other logits"),
    "no head": (bare, "no language modelling head"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_cannot_be_streamed_are_refused_with_the_reason(case):
    make, reason = REFUSED[case]
    torch.manual_seed(0)
    with pytest.raises(Unsupported, match=reason) as refusal:
        ef.open(make().eval(), SPEC)
    assert "\n" not in str(refusal.value)


# Families that no line of the library knows: maker, pairing of channels, and which layers rotate.
ALSO = {
    "olmo2": (zoo.small("Olmo2"), "half", [True, True]),
    "olmo3": (zoo.small("Olmo3", layer_types=["sliding_attention", "full_attention"], sliding_window=9), "half", [True, True]),
    "granite": (zoo.small("Granite", attention_multiplier=0.3, residual_multiplier=0.5), "half", [True, True]),
    "starcoder2": (zoo.small("Starcoder2", sliding_window=None), "half", [True, True]),
    "mixtral": (zoo.small("Mixtral", num_local_experts=3, num_experts_per_tok=2, sliding_window=None), "half", [True, True]),
    "stablelm": (zoo.small("StableLm", partial_rotary_factor=0.5), "half", [True, True]),
    "phi": (zoo.small("Phi"), "half", [True, True]),
    "glm": (zoo.small("Glm", head_dim=8), "interleaved", [True, True]),
    "ernie4.5": (zoo.small("Ernie4_5", head_dim=8), "interleaved", [True, True]),
    "smollm3": (zoo.small("SmolLM3", no_rope_layers=[1, 0]), "half", [True, False]),
    "exaone4": (
        zoo.small("Exaone4", sliding_window=9, layer_types=["sliding_attention", "full_attention"]), "half", [True, False],
    ),
    "cohere2": (
        zoo.small("Cohere2", sliding_window=9, layer_types=["full_attention", "sliding_attention"]), "interleaved",
        [False, True],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ALSO)
def test_a_family_nobody_thought_of_is_read_right(name):
    make, style, rotates = ALSO[name]
    torch.manual_seed(0)
    model, ids = make().eval(), zoo.tokens(40)
    turns = [turn if yes else None for turn, yes in zip(oracles.layer_frequencies(model), rotates, strict=True)]
    want = oracles.stepwise_logits(model, ids, 3, 8, style=style, frequencies=turns)
    stream = ef.open(model, SPEC)
    got = torch.cat([stream.feed(piece) for piece in ids.split(9, 1)], 1)
    assert oracles.relative_error(got, want) <= 1e-5


def test_a_pairing_nobody_knows_is_refused(monkeypatch):
    from transformers.models.llama import modeling_llama

    monkeypatch.setattr(modeling_llama, "rotate_half", lambda x: -x.flip(-1))
    with pytest.raises(Unsupported, match="neither halves nor neighbours"):
        ef.open(zoo.fresh("llama"), SPEC)


def test_what_is_no_model_is_a_type_error():
    for thing in (None, 12, torch.nn.Linear(2, 2), ["tiny"]):
        with pytest.raises(TypeError, match="expected a transformers model"):
            ef.open(thing, SPEC)


def test_weights_that_are_no_numbers_are_named():
    model = zoo.fresh("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj\.weight holds NaN"):
        ef.open(model, SPEC)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.fill_(1e38)
    with pytest.raises(ValueError, match="overflows in this dtype"):
        ef.open(model, SPEC)


def test_a_model_whose_own_code_differs_is_refused_with_how_far():
    """A layer that adds something position-dependent beside attention: the self-check must see it."""
    model = zoo.fresh("llama")

    def shift(module, inputs, output):
        return output + torch.arange(output.shape[1])[None, :, None] * 0.05

    model.model.layers[0].mlp.register_forward_hook(shift)
    with pytest.raises(Unsupported, match=r"differ by 0?\.\d+ standard deviations|differ by \d"):
        ef.open(model, SPEC)


def test_bidirectional_models_are_refused():
    model = zoo.fresh("llama")
    for layer in model.model.layers:
        layer.self_attn.is_causal = False
    with pytest.raises(Unsupported, match="both directions"):
        ef.open(model, SPEC)


def test_layers_that_run_twice_are_refused():
    model = zoo.fresh("llama")
    model.model.layers[1] = model.model.layers[0]
    with pytest.raises(Unsupported, match="several times"):
        ef.open(model, SPEC)


def test_a_model_without_weights_in_place_is_refused():
    with torch.device("meta"):
        model = zoo.FAMILIES["llama"]()
    with pytest.raises(Unsupported, match="one device"):
        ef.open(model, SPEC)


def test_the_self_check_runs_once_for_each_instance(monkeypatch):
    made = []
    real = decoder_module.Decoder.__init__
    monkeypatch.setattr(decoder_module.Decoder, "__init__", lambda self, model: (made.append(1), real(self, model))[1])
    model = zoo.fresh("llama")
    for _ in range(3):
        ef.open(model, SPEC)
    assert len(made) == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(2)  # weights are shared, so a change in place is seen
    ids = zoo.tokens(10)
    with torch.no_grad():
        torch.testing.assert_close(ef.open(model, SPEC).feed(ids), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert len(made) == 1
    model.lm_head = torch.nn.Linear(32, zoo.VOCABULARY, bias=False)  # replaced: the twin has to be made anew
    with torch.no_grad():
        torch.testing.assert_close(ef.open(model, SPEC).feed(ids), model(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
    assert len(made) == 2


def test_a_model_that_was_streamed_can_be_freed():
    model = zoo.fresh("llama")
    ef.open(model, SPEC).feed([1, 2, 3])
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None


def test_the_attention_function_outside_a_stream_says_what_to_do():
    model = zoo.fresh("llama")
    model.config._attn_implementation = "evenflow"
    with pytest.raises(RuntimeError, match=r"use evenflow\.open"):
        model(input_ids=zoo.tokens(3))


def test_learned_sink_needs_a_model_that_brings_it():
    with pytest.raises(ValueError, match="LlamaForCausalLM brings none; `window` keeps the same tokens"):
        ef.open(zoo.shared("llama"), "learned-sink(window=9)")
    model, ids = zoo.shared("gpt-oss"), zoo.tokens(30)
    want = oracles.stepwise_logits(model, ids, 0, 9)
    assert oracles.relative_error(ef.open(model, "learned-sink(window=9)").feed(ids), want) <= 1e-5


# -- from a folder ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    zoo.shared("llama").save_pretrained(path)
    tokenizer().save_pretrained(path)
    return path


def test_a_folder_opens_with_its_tokenizer(folder):
    for place in (folder, str(folder)):
        stream = ef.open(place, SPEC)
        assert len(list(stream.generate("ABC", max_tokens=4))) == 4
    ids = zoo.tokens(30)
    assert torch.equal(ef.open(folder, SPEC).feed(ids), ef.open(zoo.shared("llama"), SPEC).feed(ids))


def test_a_stream_resumes_in_another_loading_of_the_same_folder(folder, tmp_path):
    stream, ids = ef.open(folder, SPEC), zoo.tokens(30)
    stream.feed(ids)
    stream.save(tmp_path / "a")
    resumed = ef.resume(folder, tmp_path / "a")
    assert resumed.tokenizer is not None
    assert torch.equal(resumed.feed(ids), stream.feed(ids))


def test_dtype_is_that_of_the_weights(folder):
    assert ef.open(folder, SPEC).model.dtype == torch.float32
    assert ef.open(folder, SPEC, dtype="bfloat16").feed([1, 2]).dtype == torch.bfloat16
    assert ef.open(folder, SPEC, dtype=torch.float64).feed([1, 2]).dtype == torch.float64
    assert ef.open(zoo.shared("llama"), SPEC, dtype="float32").position == 0
    with pytest.raises(ValueError, match="convert it first"):
        ef.open(zoo.shared("llama"), SPEC, dtype="bfloat16")
    for wrong in ("float33", "int64", 32):
        with pytest.raises(ValueError, match="expected a floating point type"):
            ef.open(folder, SPEC, dtype=wrong)


def test_a_folder_without_tokenizer_is_fed_ids(tmp_path):
    zoo.shared("llama").save_pretrained(tmp_path)
    assert ef.open(tmp_path, SPEC).tokenizer is None


def test_places_without_a_model_are_named(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match="no model folder"):
        ef.open(tmp_path / "nothing" / "here", SPEC)
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        ef.open(tmp_path, SPEC)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ValueError, match="cannot load a language model") as error:
        ef.open(tmp_path, SPEC)
    assert "\n" not in str(error.value)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(ValueError, match="cannot load a language model"):
        ef.open(tmp_path, SPEC)


def test_the_shipped_model_is_a_plain_transformers_folder():
    assert tiny_path().name == "tiny"
    model, words = load("tiny")
    assert isinstance(model, PreTrainedModel) and model.dtype == torch.float32
    plain = AutoModelForCausalLM.from_pretrained(tiny_path())
    assert sum(p.numel() for p in plain.parameters()) == sum(p.numel() for p in model.parameters())
    stream = ef.open("tiny", "streaming-llm(sink=4, window=60)")
    ids = words.encode("It was a bright cold day in April, and the clocks were striking thirteen. " * 8)
    nats = stream.surprisal(ids)
    assert float(nats[0, 1:].mean()) < torch.tensor(float(model.config.vocab_size)).log()
    assert len(list(stream.generate("The old man", max_tokens=5))) == 5


def test_fingerprints_tell_weights_and_configurations_apart():
    prints = {fingerprint(zoo.shared(name)) for name in zoo.FAMILIES}
    assert len(prints) == len(zoo.FAMILIES)
    assert fingerprint(zoo.fresh("llama")) == fingerprint(zoo.fresh("llama")) == fingerprint(zoo.shared("llama"))
