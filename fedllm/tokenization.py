"""From text to token ids, and the layout of a causal-LM example.

A prompt is rendered by the tokenizer's chat template (system prompt, prompt as the user, then the header of
the assistant's turn) or, where there is none, as ``### Instruction:`` and ``### Response:``. Prompt and
response are tokenised on their own, as they are when the model generates.

An example that is too long loses tokens from the end of its response until that fills half of the length,
then from the beginning of its prompt (a leading beginning-of-sequence token stays). So no example loses its
whole response.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from fedllm.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHUNK = 8192  # texts at a time, so that few are ever held as lists of Python integers


def fit(
    prompt: array[int], response: array[int], max_length: int, bos: int | None
) -> tuple[array[int], array[int]]:
    """Shorten a prompt and its response to ``max_length`` tokens together, as the module's docstring says.

    Args:
        prompt: token ids, at least one.
        response: token ids with the end-of-sequence token, at least one.
        max_length: tokens, at least 4.
        bos: beginning-of-sequence token that stays at the beginning of a shortened prompt.
    """
    response = response[: max(max_length - len(prompt), max_length // 2)]
    room = max_length - len(response)
    if len(prompt) > room:
        head = prompt[: int(prompt[0] == bos)]
        prompt = head + prompt[len(prompt) - room + len(head) :]
    return prompt, response


def tokenize_prompts(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], system_prompt: str
) -> list[array[int]]:
    """Render prompts and tokenise them, up to where the response begins.

    Raises:
        DataError: the chat template refuses a prompt or the system prompt.
    """
    if tokenizer.chat_template:
        texts = [_render(tokenizer, prompt, system_prompt) for prompt in prompts]
        return tokenize(tokenizer, texts, add_special_tokens=False, verbose=False)
    system = f"{system_prompt}\n\n" if system_prompt else ""
    texts = [f"{system}### Instruction:\n{prompt}\n\n### Response:\n" for prompt in prompts]
    # The tokenizer's own special tokens may include one for the end, which does not belong before a response.
    first = tokenize(tokenizer, ["a"])[0][:1]
    prefix = first if first and first[0] == tokenizer.bos_token_id else array("i")
    return [prefix + ids for ids in tokenize(tokenizer, texts, add_special_tokens=False, verbose=False)]


def _render(tokenizer: PreTrainedTokenizerBase, prompt: str, system_prompt: str) -> str:
    from jinja2 import TemplateError

    system = [{"role": "system", "content": system_prompt}] if system_prompt else []
    messages = [*system, {"role": "user", "content": prompt}]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    except TemplateError as error:
        hint = "; it may know no system role: leave data.system-prompt empty" if system_prompt else ""
        raise DataError(
            f"the chat template of {tokenizer.name_or_path!r} refuses a prompt: {error}{hint}"
        ) from error


def tokenize(tokenizer: PreTrainedTokenizerBase, texts: Sequence[Any], **options: Any) -> list[array[int]]:
    """Token ids of every text, without padding; the options are those of the tokenizer."""
    result: list[array[int]] = []
    for start in range(0, len(texts), _CHUNK):
        chunk = [str(text) for text in texts[start : start + _CHUNK]]
        encoding = tokenizer(chunk, return_attention_mask=False, return_token_type_ids=False, **options)
        result.extend(array("i", ids) for ids in encoding["input_ids"])
    return result
