"""Answers by greedy generation, scored against the wanted answers with BLEU and chrF."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedllm.batches import length_sorted_batches
from fedllm.config import RunConfig
from fedllm.encoded import IGNORED, Encoded
from fedllm.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def check_generation(config: RunConfig) -> None:
    """Check that the generation metrics that the configuration asks for can be computed.

    Raises:
        ConfigError: the task generates nothing, or sacrebleu is not installed.
    """
    if config.evaluation.generate == 0:
        return
    if config.task != "causal-lm":
        raise ConfigError(
            f"evaluation.generate is {config.evaluation.generate}, but the task is {config.task}, which "
            "generates nothing: set evaluation.generate to 0 or task to causal-lm"
        )
    if importlib.util.find_spec("sacrebleu") is None:
        raise ConfigError(
            "evaluation.generate needs the package sacrebleu, which is not installed: "
            'pip install "fedllm[generation]", or set evaluation.generate to 0'
        )


def generation_metrics(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    encoded: Encoded,
    config: RunConfig,
    pad_token_id: int,
    device: torch.device | str,
) -> dict[str, float]:
    """BLEU and chrF (both 0 to 100, sacrebleu's defaults) of greedy answers to the first prompts.

    Args:
        model: a causal language model with ``generate``; its mode is restored.
        tokenizer: of the model.
        encoded: examples of the task causal-lm; the reference is the unmasked part of an example.
        config: number of prompts, new tokens and batch size.
        pad_token_id: fills prompts on the left.
        device: where the model is.

    Raises:
        ConfigError: see :func:`check_generation`.
    """
    check_generation(config)
    from sacrebleu import corpus_bleu, corpus_chrf

    chosen = encoded.select(range(min(config.evaluation.generate, len(encoded))))
    hypotheses = [""] * len(chosen)
    training = model.training
    model.eval()
    try:
        for indices in length_sorted_batches(chosen, config.server.evaluate_batch_size):
            prompts = [_parts(chosen, index)[0] for index in indices]
            answers = _answer(model, prompts, config.evaluation.max_new_tokens, pad_token_id, device)
            texts = tokenizer.batch_decode(answers, skip_special_tokens=True)
            for index, text in zip(indices, texts, strict=True):
                hypotheses[index] = text.strip()
    finally:
        model.train(training)
    targets = [_parts(chosen, index)[1] for index in range(len(chosen))]
    references = [
        text.strip()
        for text in tokenizer.batch_decode([target.tolist() for target in targets], skip_special_tokens=True)
    ]
    return {
        "bleu": float(corpus_bleu(hypotheses, [references]).score),
        "chrf": float(corpus_chrf(hypotheses, [references]).score),
        "num-generated": float(len(chosen)),
    }


def _parts(encoded: Encoded, index: int) -> tuple[Tensor, Tensor]:
    ids, labels = encoded.example(index)
    masked = labels == IGNORED
    return ids[masked], ids[~masked]


def _answer(
    model: nn.Module,
    prompts: Sequence[Tensor],
    max_new_tokens: int,
    pad_token_id: int,
    device: torch.device | str,
) -> Tensor:
    longest = max(len(prompt) for prompt in prompts)
    input_ids = torch.full((len(prompts), longest), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros_like(input_ids)
    for row, prompt in enumerate(prompts):
        input_ids[row, longest - len(prompt) :] = prompt
        attention_mask[row, longest - len(prompt) :] = 1
    with torch.no_grad():
        output: Tensor = model.generate(  # type: ignore[operator]
            input_ids=input_ids.to(device),
            attention_mask=attention_mask.to(device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            pad_token_id=pad_token_id,
        )
    return output[:, longest:].cpu()
