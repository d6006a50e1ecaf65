"""Tiny randomly initialised models with a tokenizer built in code: for tests and dry runs, no download."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
)

CHATML_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_SEED = 20_240_229
_HIDDEN, _INNER, _LAYERS, _HEADS, _POSITIONS = 32, 64, 2, 4, 512
_SPECIAL_TOKENS = {
    "pad_token": "<pad>",
    "unk_token": "<unk>",
    "bos_token": "<|im_start|>",
    "eos_token": "<|im_end|>",
    "cls_token": "<cls>",
    "sep_token": "<sep>",
    "mask_token": "<mask>",
}


def _decoder_sizes() -> dict[str, Any]:
    return {
        "hidden_size": _HIDDEN,
        "intermediate_size": _INNER,
        "num_hidden_layers": _LAYERS,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _HEADS // 2,
        "max_position_embeddings": _POSITIONS,
    }


def _llama(**shared: Any) -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(**_decoder_sizes(), **shared))


def _qwen2(**shared: Any) -> Qwen2ForCausalLM:
    return Qwen2ForCausalLM(Qwen2Config(**_decoder_sizes(), **shared))


def _gpt2(**shared: Any) -> GPT2LMHeadModel:
    config = GPT2Config(
        n_embd=_HIDDEN, n_inner=_INNER, n_layer=_LAYERS, n_head=_HEADS, n_positions=_POSITIONS, **shared
    )
    return GPT2LMHeadModel(config)


def _bert(**shared: Any) -> BertModel:
    config = BertConfig(
        hidden_size=_HIDDEN,
        intermediate_size=_INNER,
        num_hidden_layers=_LAYERS,
        num_attention_heads=_HEADS,
        max_position_embeddings=_POSITIONS,
        **shared,
    )
    return BertModel(config)


_BUILDERS: dict[str, Callable[..., Any]] = {"llama": _llama, "gpt2": _gpt2, "bert": _bert, "qwen2": _qwen2}
TINY_FAMILIES = tuple(_BUILDERS)


def build_tokenizer(family: str) -> Any:
    """A byte-level tokenizer: one token a byte, so that any text survives encoding and decoding.

    Args:
        family: one of :data:`TINY_FAMILIES`; ``bert`` frames a text with its class and separator tokens.
    """
    pieces = [*_SPECIAL_TOKENS.values(), *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={piece: number for number, piece in enumerate(pieces)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in _SPECIAL_TOKENS.values()])
    if family == "bert":
        frame = [_SPECIAL_TOKENS["cls_token"], _SPECIAL_TOKENS["sep_token"]]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{frame[0]} $A {frame[1]}",
            pair=f"{frame[0]} $A {frame[1]} $B:1 {frame[1]}:1",
            special_tokens=[(token, pieces.index(token)) for token in frame],
        )
    wrapper: Any = PreTrainedTokenizerFast
    return wrapper(
        tokenizer_object=tokenizer,
        model_max_length=_POSITIONS,
        chat_template=CHATML_TEMPLATE,
        **_SPECIAL_TOKENS,
    )


def build_tiny_model(family: str, folder: Path) -> None:
    """Write the model and tokenizer of a family into a folder, the same bytes in every process.

    Args:
        family: one of :data:`TINY_FAMILIES`.
        folder: an existing folder.
    """
    tokenizer = build_tokenizer(family)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(_SEED)
        model = _BUILDERS[family](
            vocab_size=len(tokenizer),
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
