"""Model, data and loops, in the manner of Flower's Hugging Face examples."""

from itertools import cycle, islice
from typing import Any

import torch
from datasets import Dataset, load_dataset
from flwr_datasets.partitioner import DirichletPartitioner
from peft import LoraConfig, TaskType, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, AutoTokenizer, DataCollatorWithPadding

MAX_GRAD_NORM = 1.0
LABELS = ["Business", "Sci/Tech", "Sports", "World"]
partitioner = None  # Cache the partitioned dataset


def get_model(config: Any) -> Any:
    """Base model with a LoRA adapter and a new head."""
    base = AutoModelForSequenceClassification.from_pretrained(config["model"], num_labels=len(LABELS))
    rank = int(config["lora-rank"])
    lora = LoraConfig(
        task_type=TaskType.SEQ_CLS,
        r=rank,
        lora_alpha=2 * rank,
        lora_dropout=0.0,
        target_modules=["query", "key", "value", "dense"],
        exclude_modules=["classifier"],
        modules_to_save=["classifier"],
    )
    return get_peft_model(base, lora)


def load_partition(config: Any, partition_id: int) -> Dataset:
    """Rows of a client; the file is read and dealt once per process."""
    global partitioner
    if partitioner is None:
        partitioner = DirichletPartitioner(
            num_partitions=int(config["clients"]),
            partition_by="label",
            alpha=float(config["alpha"]),
            min_partition_size=int(config["min-partition-size"]),
            seed=int(config["seed"]),
        )
        partitioner.dataset = load_dataset("csv", data_files=config["train-file"], split="train")
    return partitioner.load_partition(partition_id)


def load_test_rows(config: Any) -> Dataset:
    """The first rows of the test file."""
    return load_dataset("csv", data_files=config["test-file"], split=f"train[:{int(config['test-rows'])}]")


def get_loader(config: Any, rows: Dataset, batch_size: int, shuffle: bool) -> DataLoader:
    """Tokenise rows and make batches; ``padding`` is ``max_length`` or ``longest`` (of a batch)."""
    tokenizer = AutoTokenizer.from_pretrained(config["model"])
    max_length = int(config["max-length"])
    padding = "max_length" if config["padding"] == "max_length" else False

    def tokenize(batch: Any) -> Any:
        tokens = tokenizer(batch["text"], padding=padding, truncation=True, max_length=max_length)
        return {**tokens, "labels": [LABELS.index(label) for label in batch["label"]]}

    rows = rows.map(tokenize, batched=True, remove_columns=rows.column_names)
    return DataLoader(
        rows, batch_size=batch_size, shuffle=shuffle, collate_fn=DataCollatorWithPadding(tokenizer=tokenizer)
    )


def train(model: Any, loader: DataLoader, config: Any) -> float:
    """Train for the configured steps; returns the mean loss."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    head = [p for name, p in trained.items() if "classifier" in name]
    lora = [p for name, p in trained.items() if "classifier" not in name]
    groups = [
        {"params": lora, "lr": config["learning-rate"]},
        {"params": head, "lr": config["head-learning-rate"]},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    model.train()
    losses = []
    for batch in islice(cycle(loader), int(config["local-steps"])):
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained.values(), MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses) / len(losses)


def test(model: Any, loader: DataLoader) -> float:
    """Accuracy over all rows."""
    model.eval()
    correct = total = 0
    for batch in loader:
        with torch.no_grad():
            predicted = model(**batch).logits.argmax(dim=-1)
        correct += int((predicted == batch["labels"]).sum())
        total += len(predicted)
    return correct / total
