"""A cut model against the whole one: hidden states, logits, loss and every gradient."""

import copy

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from fedllm.errors import SplitError
from fedllm.split.model import SplitModel

SIZES = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
DECODER = SIZES | {"num_key_value_heads": 2}
GPT2 = {"vocab_size": 50, "n_embd": 16, "n_layer": 4, "n_head": 4, "n_positions": 32, "pad_token_id": 0}
FAMILIES = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**DECODER)),
    "llama-classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**DECODER, num_labels=3)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**DECODER)),
    "qwen2-sliding": lambda: Qwen2ForCausalLM(
        Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=3, max_window_layers=2)
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**DECODER, head_dim=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**SIZES, num_labels=3)),
}


def build(family):
    torch.manual_seed(0)
    return FAMILIES[family]().double().eval()


def tokens():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, 50, (3, 9), generator=generator)
    mask = torch.ones_like(ids)
    ids[1, 6:], mask[1, 6:] = 0, 0
    return ids, mask


def weighted(logits, mask):
    """Some scalar of the logits that padded places do not enter."""
    weights = torch.linspace(-1, 1, logits.shape[-1], dtype=logits.dtype)
    if logits.dim() == 3:
        logits = logits * mask[..., None]
    return (logits.tanh() * weights).sum()


@pytest.mark.parametrize("cut", [1, 2, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_pieces_are_the_whole(family, cut):
    model, (ids, mask) = build(family), tokens()
    whole = weighted(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, mask)
    whole.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    split = SplitModel(model)
    sent = split.front(ids, mask, cut)
    received = sent.detach().requires_grad_()
    between = split.blocks(received, mask, cut, 3)
    logits = split.head(split.blocks(between, mask, 3, 4), mask)
    loss = weighted(logits, mask)
    assert loss.item() == pytest.approx(whole.item(), rel=1e-12)
    loss.backward()
    sent.backward(received.grad)
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-12, msg=name)


def test_views_leave_the_model_as_it_was():
    model, (ids, mask) = build("bert"), tokens()
    config, names = copy.deepcopy(model.config), [name for name, _ in model.named_modules()]
    before = model(input_ids=ids, attention_mask=mask).logits
    split = SplitModel(model)
    split.head(split.blocks(split.front(ids, mask, 2), mask, 2, 4), mask)
    assert [name for name, _ in model.named_modules()] == names
    assert model.config.to_dict() == config.to_dict()
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, before)


def test_views_follow_the_mode_of_the_model():
    model = FAMILIES["bert"]().train()
    ids, mask = tokens()
    split = SplitModel(model)
    model.eval()
    assert torch.equal(split.front(ids, mask, 2), split.front(ids, mask, 2))
    model.train()
    assert not torch.equal(split.front(ids, mask, 2), split.front(ids, mask, 2))


def test_a_family_that_cannot_be_cut_is_told():
    model = OPTForCausalLM(
        OPTConfig(vocab_size=50, hidden_size=16, ffn_dim=24, num_hidden_layers=2, num_attention_heads=4,
                  word_embed_proj_dim=16, max_position_embeddings=32)
    )  # fmt: skip
    with pytest.raises(SplitError, match=r"'opt' cannot be cut; those that can: llama, .*bert"):
        SplitModel(model)
    with pytest.raises(SplitError, match=r"'Linear' cannot be cut"):
        SplitModel(nn.Linear(2, 2))


@pytest.mark.parametrize("cut", [0, -1, 4, 9])
def test_both_sides_keep_a_block(cut):
    with pytest.raises(SplitError, match=rf"hsplitlora.cut: expected 1 to 3 .*found {cut}"):
        SplitModel(build("llama")).check_cut(cut, "hsplitlora.cut")
