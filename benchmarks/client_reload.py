"""Seconds from a training message to the first step, for clients that a process serves after its first one.

Ours (the client that a Flower message reaches: base model, tokenizer and tokens stay in the process) against loading
model and tokenizer and tokenising in every message, as Flower's LLM example does. SmolLM2-135M with LoRA, causal-lm on
the packaged question-answer pairs. Both sides run in turn in this process, read the same safetensors folder and get the
same adapter; the clock stops when the first batch is ready for the model.
"""

from __future__ import annotations

import json
import time
from statistics import median
from typing import Any

import torch
from datasets import Dataset
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.supercore.task_identity import (
    TaskIdentity,
)  # flwr's processes set it; messages cannot be made without
from harness import arguments, report
from peft import LoraConfig, TaskType, get_peft_model, set_peft_model_state_dict
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from fedllm import client
from fedllm.batches import train_batches
from fedllm.config import RunConfig
from fedllm.data import load_client_rows
from fedllm.model_sources import quiet_transformers, resolve_model
from fedllm.models import load_bundle
from fedllm.progress_bars import no_progress_bars
from fedllm.records import (
    ARRAYS,
    CLIENT,
    CLIENT_PARAMETERS,
    CONFIG,
    SEED,
    SERVER_ROUND,
    UPLOAD_CODEC,
    encode,
)
from fedllm.rows import Rows
from fedllm.update import TrainJob, TrainResult

CLIENTS = 10
BATCH_SIZE = 16
MAX_LENGTH = 128


class FirstBatch:
    """An update rule that stops where training would begin."""

    reached = 0.0

    def run(self, job: TrainJob) -> TrainResult:
        """Make the first batch and note the time."""
        indices = next(train_batches(job.examples, job.train, job.seed))
        job.task.collate(job.examples, indices, job.bundle.tokenizer.pad_token_id)
        FirstBatch.reached = time.perf_counter()
        return TrainResult(job.start, len(job.examples), loss=0.0)


def run_ours(config: RunConfig, arrays: ArrayRecord, partition: int) -> float:
    """Hand a message to the client code that fedllm's ClientApp calls."""
    request = ConfigRecord(
        {
            CLIENT: f"{__name__}:{FirstBatch.__name__}",
            CLIENT_PARAMETERS: json.dumps({}),
            SEED: config.seed,
            SERVER_ROUND: 1,
            UPLOAD_CODEC: "fp32",
        }
    )
    message = Message(
        RecordDict({ARRAYS: arrays, CONFIG: request}), dst_node_id=partition + 1, message_type="train"
    )
    context = Context(
        run_id=1,
        node_id=partition + 1,
        node_config={"partition-id": partition, "num-partitions": CLIENTS},
        state=RecordDict(),
        run_config=config.to_flat(),
    )
    started = time.perf_counter()
    client.train(message, context)
    return FirstBatch.reached - started


def run_stock(folder: str, config: RunConfig, arrays: ArrayRecord, rows: Rows) -> float:
    """Load, adapt and tokenise as Flower's LLM example does; the client's rows are in memory already."""
    dataset = Dataset.from_dict(rows.columns)
    started = time.perf_counter()
    model: Any = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
        LoraConfig(
            task_type=TaskType.CAUSAL_LM,
            r=config.lora.rank,
            lora_alpha=2 * config.lora.rank,
            target_modules="all-linear",
        ),
    )
    set_peft_model_state_dict(model, arrays.to_torch_state_dict())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token

    def tokenize(batch: Any) -> Any:
        texts = [
            f"{prompt}\n{answer}" for prompt, answer in zip(batch["prompt"], batch["response"], strict=True)
        ]
        return tokenizer(texts, truncation=True, max_length=MAX_LENGTH)

    tokens = dataset.map(tokenize, batched=True, remove_columns=dataset.column_names)
    collate = DataCollatorForLanguageModeling(tokenizer, mlm=False)
    next(iter(DataLoader(tokens, batch_size=BATCH_SIZE, shuffle=True, collate_fn=collate)))
    return time.perf_counter() - started


def main() -> None:
    args = arguments(__doc__ or "", model="packaged:smollm2", repetitions=9)
    repetitions = min(args.repetitions, 3) if args.quick else args.repetitions
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    config = RunConfig.from_flat(
        {
            "task": "causal-lm",
            "seed": args.seed,
            "model.name": args.model,
            "model.device": "cpu",
            "data.max-length": MAX_LENGTH,
            "train.batch-size": BATCH_SIZE,
        }
    )
    folder = resolve_model(config.model).path
    arrays = encode(load_bundle(config).adapter_state())
    ours, stock = [], []
    with no_progress_bars(), quiet_transformers():
        for repetition in range(repetitions + 1):
            partition = repetition % CLIENTS
            ours.append(run_ours(config, arrays, partition))
            stock.append(run_stock(folder, config, arrays, load_client_rows(config, partition, CLIENTS)))
    # The first client of a process pays for imports and files on either side.
    ours_seconds, stock_seconds = median(ours[1:]), median(stock[1:])
    figures = {
        "model": args.model,
        "repetitions": repetitions,
        "stock_seconds": stock_seconds,
        "ours_seconds": ours_seconds,
        "ratio": stock_seconds / ours_seconds,
    }
    rows = [
        ("", "Flower's LLM example", "fedllm", "ratio"),
        ("seconds from message to first step", stock_seconds, ours_seconds, figures["ratio"]),
    ]
    report(args, figures, rows, f"Second client of a process, {args.model}, median of {repetitions}")


if __name__ == "__main__":
    main()
