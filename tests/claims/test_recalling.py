"""The claim about recall in a trained model tells a model that knows from one that does not."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from evenflow.claims import recalling
from evenflow.claims.registry import Bench
from evenflow.learn.toys import Repeat


def test_a_share_of_tokens_predicted_right():
    ids = torch.tensor([[3, 1, 2, 0], [0, 2, 2, 1]])
    said = torch.nn.functional.one_hot(torch.tensor([[1, 2, 3, 0], [0, 2, 1, 3]]), 4).float()
    assert recalling.right(said, ids) == 4 / 6


def test_an_untrained_model_knows_nothing_and_the_claim_says_so():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=64, bos_token_id=0, eos_token_id=None,
    )  # fmt: skip
    bench, model, task = Bench(False, lambda text: None), LlamaForCausalLM(config).eval(), Repeat(True)
    recalling.at_once(bench, model, task, 3)
    recalling.later(bench, model, task, 3)
    verdicts = {row.what.partition(": ")[2]: row.holds for row in bench.rows}
    assert len(bench.rows) == len(recalling.AT_ONCE) + 1 + len(recalling.LATER)
    for spec, kept in (recalling.AT_ONCE | recalling.LATER).items():
        assert verdicts[spec] == {True: False, False: True, None: None}[kept], spec
