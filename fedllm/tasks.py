"""What is learned: how rows become token ids and labels, the loss, and the metrics."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedllm.batches import length_sorted_batches
from fedllm.config import DataConfig
from fedllm.encoded import IGNORED, Encoded
from fedllm.errors import ConfigError, DataError
from fedllm.tokenization import fit, tokenize, tokenize_prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

log = logging.getLogger(__name__)

Batch = dict[str, Tensor]
Rows = Mapping[str, Sequence[Any]]


class Task(ABC):
    """A task: columns → token ids and labels → loss → metrics. Stateless."""

    name: ClassVar[str]

    @abstractmethod
    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """Names of the columns that :meth:`encode` needs."""

    @abstractmethod
    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: tuple[str, ...]
    ) -> Encoded:
        """Tokenise rows; example i of the result is row i.

        Args:
            rows: column name → values, all of one length.
            tokenizer: of the base model.
            data: column names and the longest example in tokens.
            labels: class names in order of their ids; empty for a task without classes.

        Raises:
            DataError: a label is none of the known ones, or the tokenizer does not fit the task.
        """

    @abstractmethod
    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy of a batch, a float32 scalar that can be differentiated."""

    @abstractmethod
    def num_targets(self, batch: Batch) -> int:
        """How many predictions :meth:`loss` takes its mean over."""

    def collate(
        self, encoded: Encoded, indices: Sequence[int], pad_token_id: int, *, multiple_of: int = 1
    ) -> Batch:
        """Pad examples on the right to the longest of them.

        Args:
            encoded: where the examples are.
            indices: which of them, at least one.
            pad_token_id: fills ``input_ids`` after the end of an example.
            multiple_of: the padded length is rounded up to a multiple of this; 8 suits tensor cores.

        Returns:
            int64 tensors ``input_ids`` and ``attention_mask`` ``[batch, length]``, and ``labels`` ``[batch]``
            or, where tokens have labels, ``[batch, length]`` padded with -100.
        """
        examples = [encoded.example(index) for index in indices]
        longest = max(len(ids) for ids, _ in examples)
        shape = (len(examples), -(-longest // multiple_of) * multiple_of)
        input_ids = torch.full(shape, pad_token_id, dtype=torch.int64)
        attention_mask = torch.zeros(shape, dtype=torch.int64)
        labels = torch.full(shape if encoded.has_token_labels else shape[:1], IGNORED, dtype=torch.int64)
        for row, (ids, label) in enumerate(examples):
            input_ids[row, : len(ids)] = ids
            attention_mask[row, : len(ids)] = 1
            if encoded.has_token_labels:
                labels[row, : len(ids)] = label
            else:
                labels[row] = label
        return {"input_ids": input_ids, "attention_mask": attention_mask, "labels": labels}

    def evaluate(
        self,
        model: nn.Module,
        encoded: Encoded,
        batch_size: int,
        pad_token_id: int,
        device: torch.device | str,
    ) -> dict[str, float]:
        """Metrics over all examples, the same for every batch size; the model's mode is restored.

        Raises:
            DataError: there is no example.
        """
        if len(encoded) == 0:
            raise DataError("there are no examples to evaluate on")
        training = model.training
        model.eval()
        try:
            # Not inference_mode: what a model caches there could not enter autograd in the next round.
            with torch.no_grad():
                metrics = self._metrics(model, self._batches(encoded, batch_size, pad_token_id, device))
        finally:
            model.train(training)
        return {**metrics, "num-examples": float(len(encoded))}

    @abstractmethod
    def _metrics(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        """Metrics over the batches, weighted so that how they were cut does not matter."""

    def _batches(
        self, encoded: Encoded, batch_size: int, pad_token_id: int, device: torch.device | str
    ) -> Iterator[Batch]:
        for indices in length_sorted_batches(encoded, batch_size):
            batch = self.collate(encoded, indices, pad_token_id)
            yield {name: tensor.to(device) for name, tensor in batch.items()}


class SequenceClassification(Task):
    """One class for a text; accuracy, macro-F1 and loss."""

    name = "sequence-classification"

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """The text and the label column."""
        return (data.text_column, data.label_column)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: tuple[str, ...]
    ) -> Encoded:
        """Tokenise the texts, cut at the end to ``data.max_length`` tokens; see :meth:`Task.encode`."""
        ids = class_ids(rows[data.label_column], labels)
        texts = rows[data.text_column]
        tokens = tokenize(tokenizer, texts, truncation=True, max_length=data.max_length)
        for row, found in enumerate(tokens):
            if not found:
                raise DataError(
                    f"row {row + 1}: the tokenizer makes no token of {texts[row]!r}; remove the row"
                )
        return Encoded.from_lists(tokens, ids)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the examples."""
        return F.cross_entropy(_class_logits(model, batch), batch["labels"])

    def num_targets(self, batch: Batch) -> int:
        """The number of examples."""
        return len(batch["labels"])

    def _metrics(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        total = 0.0
        truth, predicted = [], []
        for batch in batches:
            logits = _class_logits(model, batch)
            total += float(F.cross_entropy(logits, batch["labels"], reduction="sum"))
            truth.append(batch["labels"].cpu())
            predicted.append(logits.argmax(dim=-1).cpu())
        labels, predictions = torch.cat(truth), torch.cat(predicted)
        return {
            "loss": total / len(labels),
            "accuracy": float((labels == predictions).double().mean()),
            "macro-f1": macro_f1(labels, predictions),
        }


class CausalLM(Task):
    """The next token of an answer given its prompt; loss, perplexity and tokens.

    A row becomes ``prompt tokens + response tokens + end-of-sequence``; the prompt is masked in the labels.
    How prompts are rendered and what long examples lose is told in :mod:`fedllm.tokenization`.
    """

    name = "causal-lm"

    def columns(self, data: DataConfig) -> tuple[str, ...]:
        """The prompt and the response column."""
        return (data.prompt_column, data.response_column)

    def encode(
        self, rows: Rows, tokenizer: PreTrainedTokenizerBase, data: DataConfig, labels: tuple[str, ...]
    ) -> Encoded:
        """Render, tokenise, join and mask; see :class:`CausalLM` for the format and :meth:`Task.encode`."""
        if tokenizer.eos_token_id is None:
            raise DataError(
                "causal-lm needs a tokenizer with an end-of-sequence token, and this one "
                f"({tokenizer.name_or_path!r}) has none: choose the model of a generative language model"
            )
        prompts = [str(value) for value in rows[data.prompt_column]]
        responses = [str(value) for value in rows[data.response_column]]
        prompt_ids = tokenize_prompts(tokenizer, prompts, data.system_prompt)
        response_ids = tokenize(tokenizer, responses, add_special_tokens=False, verbose=False)
        tokens, token_labels = [], []
        shortened = 0
        for prompt, response in zip(prompt_ids, response_ids, strict=True):
            full = response + array("i", [tokenizer.eos_token_id])
            kept_prompt, kept = fit(prompt, full, data.max_length, tokenizer.bos_token_id)
            shortened += len(kept_prompt) + len(kept) < len(prompt) + len(full)
            tokens.append(kept_prompt + kept)
            token_labels.append(array("i", [IGNORED]) * len(kept_prompt) + kept)
        if shortened:
            log.warning(
                "%d of %d examples are longer than data.max-length (%d tokens) and were shortened",
                shortened, len(tokens), data.max_length,
            )  # fmt: skip
        return Encoded.from_lists(tokens, token_labels)

    def loss(self, model: nn.Module, batch: Batch) -> Tensor:
        """Mean cross-entropy over the unmasked tokens, each predicted from the tokens before it."""
        logits, targets = _token_logits(model, batch)
        return F.cross_entropy(logits, targets)

    def num_targets(self, batch: Batch) -> int:
        """The number of unmasked tokens that have a token before them."""
        return int((batch["labels"][:, 1:] != IGNORED).sum())

    def _metrics(self, model: nn.Module, batches: Iterator[Batch]) -> dict[str, float]:
        total, tokens = 0.0, 0
        for batch in batches:
            logits, targets = _token_logits(model, batch)
            total += float(F.cross_entropy(logits, targets, reduction="sum"))
            tokens += len(targets)
        loss = total / tokens
        perplexity = float(
            torch.tensor(loss, dtype=torch.float64).exp()
        )  # infinite, where math.exp would raise
        return {"loss": loss, "perplexity": perplexity, "tokens": float(tokens)}


TASKS: Mapping[str, type[Task]] = {task.name: task for task in (SequenceClassification, CausalLM)}


def get_task(name: str) -> Task:
    """The task of a name.

    Raises:
        ConfigError: there is no such task.
    """
    if name not in TASKS:
        raise ConfigError(f"task: expected one of {', '.join(TASKS)}, found {name!r}")
    return TASKS[name]()


def class_ids(values: Sequence[Any], labels: tuple[str, ...], origin: str = "the data") -> list[int]:
    """Turn labels into class ids.

    A value is the name of a class or, unless classes are named by numbers, the index of one.

    Args:
        values: strings, integers or whole floats.
        labels: class names in order of their ids.
        origin: where the values come from, for the message.

    Raises:
        DataError: a value is neither; names the value, its row (from 1) and the known classes.
    """
    known = {name: index for index, name in enumerate(labels)}
    if not any(name.isdecimal() for name in labels):
        known |= {str(index): index for index in range(len(labels))}
    result = []
    for row, value in enumerate(values):
        name = label_text(value)
        if name not in known:
            raise DataError(
                f"row {row + 1} of {origin} has the label {name!r}; known classes are {', '.join(labels)}: "
                "correct the row, or set data.labels to the class names in order"
            )
        result.append(known[name])
    return result


def label_text(value: Any) -> str:
    """A label as text without surrounding blanks; 1.0, which a column with gaps makes of 1, is ``1``."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def macro_f1(labels: Tensor, predictions: Tensor) -> float:
    """Unweighted mean of the F1 scores of the classes that occur among the labels or the predictions.

    Args:
        labels: true class ids ``[n]``, at least one.
        predictions: predicted class ids ``[n]``.
    """
    classes = int(torch.maximum(labels.max(), predictions.max())) + 1
    correct = torch.bincount(labels[labels == predictions], minlength=classes)
    occurring = torch.bincount(labels, minlength=classes) + torch.bincount(predictions, minlength=classes)
    present = occurring > 0
    return float((2.0 * correct[present].double() / occurring[present]).mean())


def loss_of_logits(task: Task, logits: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """The task's loss where the logits of a batch are already there, as in split learning.

    Args:
        task: whose loss.
        logits: of the model's head, ``[batch, classes]`` or ``[batch, length, vocabulary]``.
        mask: attention mask ``[batch, length]``.
        labels: ``[batch]`` or ``[batch, length]``.
    """
    return task.loss(_Answered(logits), {"input_ids": mask, "attention_mask": mask, "labels": labels})


class _Answered(nn.Module):
    """A model that has already run."""

    def __init__(self, logits: Tensor) -> None:
        super().__init__()
        self.logits = logits

    def forward(self, **_inputs: Any) -> _Answered:
        return self


def _class_logits(model: nn.Module, batch: Batch) -> Tensor:
    logits: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return logits.float()


def _token_logits(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Logits ``[unmasked, vocabulary]`` and targets ``[unmasked]``; masked positions never become float32."""
    output = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False)
    targets = batch["labels"][:, 1:]
    unmasked = targets != IGNORED
    return output.logits[:, :-1][unmasked].float(), targets[unmasked]
