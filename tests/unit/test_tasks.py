"""Tasks: encoding, collation, loss, metrics and batches, against values worked out another way."""

from __future__ import annotations

import math
from array import array
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedllm.batches import count_steps, length_sorted_batches, train_batches
from fedllm.config import DataConfig, RunConfig, TrainConfig
from fedllm.encoded import Encoded
from fedllm.errors import ConfigError, DataError
from fedllm.generation import generation_metrics
from fedllm.tasks import CausalLM, SequenceClassification, class_ids, get_task, macro_f1
from fedllm.tokenization import fit

PAD, UNK, BOS, EOS = range(4)
WORDS = [
    "[PAD]",
    "[UNK]",
    "[BOS]",
    "[EOS]",
    *(f"w{number}" for number in range(60)),
    "#",
    "Instruction",
    "Response",
    ":",
]
CHATML = (
    "{% for m in messages %}{% if m.role == 'system' %}w1 {% else %}w2 {% endif %}"
    "{{ m.content }} w3 {% endfor %}"
    "{% if add_generation_prompt %}w4 {% endif %}"
)


def make_tokenizer(
    *, chat_template: str | None = None, bos: bool = False, eos: bool = True
) -> PreTrainedTokenizerFast:
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    if bos:
        backend.post_processor = processors.TemplateProcessing(
            single="[BOS] $A", special_tokens=[("[BOS]", BOS)]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", bos_token="[BOS]",
        eos_token="[EOS]" if eos else None,
    )  # fmt: skip
    tokenizer.chat_template = chat_template
    return tokenizer


def words(text: str) -> list[int]:
    return [WORDS.index(word) for word in text.split()]


def ragged(count: int, *, token_labels: bool = False, seed: int = 0) -> Encoded:
    random = np.random.default_rng(seed)
    ids = [random.integers(4, len(WORDS), random.integers(2, 20)).tolist() for _ in range(count)]
    if token_labels:
        return Encoded.from_lists(ids, [[-100] * (len(row) // 2) + row[len(row) // 2 :] for row in ids])
    return Encoded.from_lists(ids, random.integers(0, 3, count).tolist())


def bert(labels: int = 3) -> BertForSequenceClassification:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, num_labels=labels, pad_token_id=PAD,
    )  # fmt: skip
    return BertForSequenceClassification(config)


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# --- Encoded ---


@settings(max_examples=50, deadline=None, derandomize=True)
@given(
    rows=st.lists(st.lists(st.integers(0, 1000), max_size=6), max_size=8),
    token_labels=st.booleans(),
    data=st.data(),
)
def test_encoded_selects_what_lists_select(rows, token_labels, data):
    labels = [[-token for token in row] for row in rows] if token_labels else list(range(len(rows)))
    encoded = Encoded.from_lists(rows, labels)
    chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=10)) if rows else []
    part = encoded.select(chosen)
    assert len(part) == len(chosen)
    assert part.lengths.tolist() == [len(rows[index]) for index in chosen]
    assert [part.example(i)[0].tolist() for i in range(len(part))] == [rows[index] for index in chosen]
    assert [part.example(i)[1].tolist() for i in range(len(part))] == [labels[index] for index in chosen]


@pytest.mark.parametrize("token_labels", [False, True])
def test_encoded_survives_a_file(tmp_path, token_labels):
    encoded = ragged(7, token_labels=token_labels)
    encoded.save(tmp_path / "x.safetensors")
    loaded = Encoded.load(tmp_path / "x.safetensors")
    for name in ("input_ids", "offsets", "labels"):
        assert torch.equal(getattr(loaded, name), getattr(encoded, name))
        assert getattr(loaded, name).dtype == getattr(encoded, name).dtype


def test_a_damaged_file_is_recognised(tmp_path):
    path = tmp_path / "x.safetensors"
    ragged(7).save(path)
    good = path.read_bytes()
    for bad in (good[:-5], b"", b"junk" * 10, good[:-1] + bytes([good[-1] ^ 1])):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=r"x\.safetensors"):
            Encoded.load(path)


@pytest.mark.parametrize(
    ("ids", "offsets", "labels"),
    [
        (torch.zeros(3), torch.tensor([0, 3]), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 2]), torch.zeros(1, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 4, 3]), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(3, dtype=torch.int32), torch.tensor([0, 3]), torch.zeros(2, dtype=torch.int32)),
    ],
)
def test_encoded_refuses_tensors_that_do_not_fit(ids, offsets, labels):
    with pytest.raises(ValueError, match="must"):
        Encoded(ids, offsets, labels)


# --- labels ---


def test_labels_are_names_or_indices():
    assert class_ids(["b", " a ", 1, "0", 1.0, np.int64(0)], ("a", "b")) == [1, 0, 1, 0, 1, 0]
    assert class_ids([1, "2", 2.0], ("1", "2", "10")) == [0, 1, 1]  # numbers that are names are never indices


@pytest.mark.parametrize("value", ["c", 2, -1, None, 0.5, True])
def test_unknown_labels_are_refused(value):
    with pytest.raises(DataError, match=r"row 2 of file\.csv has the label .*known classes are a, b"):
        class_ids(["a", value], ("a", "b"), "file.csv")


def test_a_class_named_by_a_number_is_not_an_index():
    with pytest.raises(DataError, match="'0'"):
        class_ids(["1", "0"], ("1", "2"))


# --- classification ---


def test_classification_encodes_and_truncates():
    rows = {"text": ["w1 w2", "w1 w2 w3 w4 w5 w6"], "label": ["pos", 0]}
    encoded = SequenceClassification().encode(
        rows, make_tokenizer(bos=True), DataConfig(max_length=5), ("neg", "pos")
    )
    assert encoded.labels.tolist() == [1, 0]
    assert encoded.example(0)[0].tolist() == [BOS, *words("w1 w2")]
    assert encoded.example(1)[0].tolist() == [BOS, *words("w1 w2 w3 w4")]


def test_a_text_without_tokens_is_refused():
    with pytest.raises(DataError, match="row 2"):
        SequenceClassification().encode(
            {"text": ["w1", " "], "label": [0, 1]}, make_tokenizer(), DataConfig(), ("a", "b")
        )


def test_collation_pads_to_the_longest():
    encoded = Encoded.from_lists([[5, 6], [7], [8, 9, 10]], [2, 0, 1])
    batch = SequenceClassification().collate(encoded, [1, 0], pad_token_id=99)
    assert batch["input_ids"].tolist() == [[7, 99], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 0], [1, 1]]
    assert batch["labels"].tolist() == [0, 2]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert SequenceClassification().collate(encoded, [2], 0, multiple_of=8)["input_ids"].shape == (1, 8)


def test_token_labels_are_padded_with_the_ignored_label():
    encoded = Encoded.from_lists([[5, 6], [7]], [[-100, 6], [7]])
    batch = CausalLM().collate(encoded, [0, 1], pad_token_id=0)
    assert batch["labels"].tolist() == [[-100, 6], [7, -100]]


def test_classification_loss_is_the_models_own():
    model, task, encoded = bert(), SequenceClassification(), ragged(6)
    model.eval()
    batch = task.collate(encoded, range(6), PAD)
    assert torch.allclose(task.loss(model, batch), model(**batch).loss)


def test_loss_is_float32_and_differentiable():
    for model, task, encoded in (
        (bert().bfloat16(), SequenceClassification(), ragged(3)),
        (llama().bfloat16(), CausalLM(), ragged(3, token_labels=True)),
    ):
        loss = task.loss(model, task.collate(encoded, range(3), PAD))
        loss.backward()
        assert loss.dtype == torch.float32
        assert any(p.grad is not None and bool(p.grad.abs().sum() > 0) for p in model.parameters())


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_classification_metrics_against_scikit_learn(batch_size):
    from sklearn.metrics import accuracy_score, f1_score, log_loss

    model, task, encoded = bert(), SequenceClassification(), ragged(23)
    model.eval()
    with torch.no_grad():
        logits = torch.cat(
            [
                model(**{k: v for k, v in task.collate(encoded, [i], PAD).items() if k != "labels"}).logits
                for i in range(23)
            ]
        )
    truth, predicted = encoded.labels.numpy(), logits.argmax(-1).numpy()
    metrics = task.evaluate(model, encoded, batch_size, PAD, "cpu")
    assert metrics == pytest.approx(
        {
            "loss": log_loss(truth, logits.double().softmax(-1).numpy(), labels=[0, 1, 2]),
            "accuracy": accuracy_score(truth, predicted),
            "macro-f1": f1_score(truth, predicted, average="macro"),
            "num-examples": 23.0,
        },
        rel=1e-5,
    )


@settings(max_examples=60, deadline=None, derandomize=True)
@given(pairs=st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4)), min_size=1, max_size=30))
def test_macro_f1_against_scikit_learn(pairs):
    from sklearn.metrics import f1_score

    truth, predicted = zip(*pairs, strict=True)
    expected = f1_score(truth, predicted, average="macro", zero_division=0)
    assert macro_f1(torch.tensor(truth), torch.tensor(predicted)) == pytest.approx(expected)


def test_evaluation_restores_the_mode_and_needs_examples():
    model, task = bert(), SequenceClassification()
    for training in (True, False):
        model.train(training)
        task.evaluate(model, ragged(3), 2, PAD, "cpu")
        assert model.training is training
    with pytest.raises(DataError, match="no examples"):
        task.evaluate(model, ragged(3).select([]), 2, PAD, "cpu")


# --- causal language model ---


def encode_pair(tokenizer, prompt="w5 w6", response="w7", **options) -> tuple[list[int], list[int]]:
    encoded = CausalLM().encode(
        {"prompt": [prompt], "response": [response]}, tokenizer, DataConfig(**options), ()
    )
    ids, labels = encoded.example(0)
    return ids.tolist(), labels.tolist()


def test_chat_template_is_used_and_the_prompt_masked():
    ids, labels = encode_pair(make_tokenizer(chat_template=CHATML), system_prompt="w9")
    prompt = words("w1 w9 w3 w2 w5 w6 w3 w4")
    assert ids == [*prompt, *words("w7"), EOS]
    assert labels == [-100] * len(prompt) + [*words("w7"), EOS]
    assert encode_pair(make_tokenizer(chat_template=CHATML))[0] == [*words("w2 w5 w6 w3 w4 w7"), EOS]


@pytest.mark.parametrize("bos", [False, True])
def test_plain_format_without_a_chat_template(bos):
    ids, labels = encode_pair(make_tokenizer(bos=bos), system_prompt="w9")
    pieces = make_tokenizer()("w9\n\n### Instruction:\nw5 w6\n\n### Response:\n")["input_ids"]
    prompt = [BOS] * bos + pieces
    assert ids == [*prompt, *words("w7"), EOS]
    assert labels == [-100] * len(prompt) + [*words("w7"), EOS]


def test_long_examples_keep_half_of_the_length_for_the_response(caplog):
    tokenizer = make_tokenizer(chat_template=CHATML)
    long = " ".join(["w8"] * 40)
    ids, labels = encode_pair(tokenizer, prompt=long, response="w7", max_length=8)
    assert ids == [*words("w8 w8 w8 w8 w3 w4 w7"), EOS]  # the prompt lost its beginning
    assert "1 of 1 examples" in caplog.text
    ids, labels = encode_pair(tokenizer, prompt=long, response=long, max_length=8)
    assert (len(ids), sum(label != -100 for label in labels)) == (8, 4)
    assert EOS not in ids  # the answer goes on: its end must not be learned
    ids, labels = encode_pair(tokenizer, prompt="w5", response=long, max_length=8)
    assert ids == words("w2 w5 w3 w4 w8 w8 w8 w8")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(prompt=st.integers(1, 30), response=st.integers(1, 30), length=st.integers(4, 40), bos=st.booleans())
def test_shortened_examples_always_have_both_parts(prompt, response, length, bos):
    whole, answer = (
        array("i", [1 if bos else 9, *range(100, 99 + prompt)]),
        array("i", range(200, 200 + response)),
    )
    kept, kept_answer = fit(whole, answer, length, 1)
    assert len(kept) >= 1
    assert len(kept_answer) >= min(response, length // 2)
    assert len(kept) + len(kept_answer) == min(prompt + response, length)
    assert kept_answer == answer[: len(kept_answer)]
    assert kept == whole[len(whole) - len(kept) :] or (
        bos and kept == whole[:1] + whole[len(whole) - len(kept) + 1 :]
    )
    assert not bos or kept[0] == 1


def test_causal_loss_is_the_models_own():
    model, task, encoded = llama(), CausalLM(), ragged(6, token_labels=True)
    batch = task.collate(encoded, range(6), PAD)
    assert torch.allclose(task.loss(model, batch), model(**batch).loss, atol=1e-6)


@pytest.mark.parametrize("batch_size", [1, 4, 100])
def test_causal_metrics_token_by_token(batch_size):
    model, task, encoded = llama(), CausalLM(), ragged(9, token_labels=True)
    losses = []
    for index in range(9):
        ids, labels = (tensor.long() for tensor in encoded.example(index))
        logits = model(input_ids=ids[None]).logits[0]
        losses += [
            float(F.cross_entropy(logits[place - 1].detach(), labels[place].clone()))
            for place in range(1, len(ids))
            if labels[place] != -100
        ]
    metrics = task.evaluate(model, encoded, batch_size, PAD, "cpu")
    loss = sum(losses) / len(losses)
    expected = {"loss": loss, "perplexity": math.exp(loss), "tokens": len(losses), "num-examples": 9}
    assert metrics == pytest.approx(expected, rel=1e-5)


def test_causal_lm_needs_an_end_token():
    with pytest.raises(DataError, match="end-of-sequence"):
        encode_pair(make_tokenizer(eos=False))


def test_a_template_that_refuses_is_told():
    template = (
        "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}w1"
    )
    with pytest.raises(DataError, match=r"System role not supported.*data\.system-prompt"):
        encode_pair(make_tokenizer(chat_template=template), system_prompt="w9")


def test_unknown_task():
    assert get_task("causal-lm").name == "causal-lm"
    with pytest.raises(ConfigError, match="'nonsense'"):
        get_task("nonsense")


# --- generation ---


class Parrot(torch.nn.Module):
    """Answers with the last two tokens of the prompt, so prompts must not be padded on the right."""

    def generate(self, input_ids, attention_mask, **options):
        assert bool((attention_mask[:, -1] == 1).all())
        assert options["do_sample"] is False
        assert torch.equal(attention_mask, (input_ids != PAD).long())
        return torch.cat([input_ids, input_ids[:, -2:]], dim=1)


def test_generation_scores_answers_against_references():
    task, tokenizer = CausalLM(), make_tokenizer(chat_template="{{ messages[0].content }}")
    config = RunConfig.from_flat(
        {"task": "causal-lm", "evaluation.generate": 2, "server.evaluate-batch-size": 2}
    )
    prompts, right = ["w1 w2 w3 w4", "w5 w6"], ["w3 w4", "w5 w6"]
    for responses, score in ((right, 100.0), (["w9 w10", "w11 w12"], 0.0)):
        encoded = task.encode({"prompt": prompts, "response": responses}, tokenizer, config.data, ())
        metrics = generation_metrics(Parrot(), tokenizer, encoded, config, PAD, "cpu")
        assert metrics["num-generated"] == 2
        assert (metrics["chrf"] > 99) if score else (metrics["chrf"] < 50)


def test_generation_with_a_real_model():
    config = RunConfig.from_flat(
        {"task": "causal-lm", "evaluation.generate": 3, "evaluation.max-new-tokens": 4}
    )
    tokenizer = make_tokenizer(chat_template=CHATML)
    encoded = CausalLM().encode({"prompt": ["w1"] * 5, "response": ["w2"] * 5}, tokenizer, config.data, ())
    model = llama().train()
    metrics = generation_metrics(model, tokenizer, encoded, config, PAD, "cpu")
    assert metrics["num-generated"] == 3
    assert 0 <= metrics["bleu"] <= 100
    assert model.training


def test_generation_without_sacrebleu_names_the_extra(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = RunConfig.from_flat({"task": "causal-lm", "evaluation.generate": 2})
    with pytest.raises(ConfigError, match=r"fedllm\[generation\]"):
        generation_metrics(Parrot(), SimpleNamespace(), ragged(2, token_labels=True), config, PAD, "cpu")


# --- batches ---


def test_every_epoch_uses_every_example_once_in_a_new_order():
    encoded, train = ragged(100), TrainConfig(batch_size=8, local_epochs=2)
    batches = list(train_batches(encoded, train, seed=5))
    assert len(batches) == count_steps(100, train) == 26
    first, second = batches[:13], batches[13:]
    assert first != second
    for epoch in (first, second):
        assert sorted(index for batch in epoch for index in batch) == list(range(100))
        assert sorted(map(len, epoch)) == [4] + [8] * 12
    assert batches == list(train_batches(encoded, train, seed=5))
    assert batches != list(train_batches(encoded, train, seed=6))


@pytest.mark.parametrize(
    ("steps", "epochs", "expected"),
    [(3, 9.0, 3), (30, 1.0, 30), (0, 0.5, 7), (0, 0.01, 1), (0, 1.5, 20), (0, 3 / 13, 3)],
)
def test_steps_or_epochs_decide_how_many(steps, epochs, expected):
    train = TrainConfig(batch_size=8, local_steps=steps, local_epochs=epochs)
    assert len(list(train_batches(ragged(100), train, 0))) == count_steps(100, train) == expected


def test_batches_save_padding_without_sorting_the_epoch():
    encoded = ragged(1024)
    lengths = encoded.lengths

    def padding(batches: list[list[int]]) -> int:
        return sum(int(lengths[batch].max()) * len(batch) - int(lengths[batch].sum()) for batch in batches)

    batches = list(train_batches(encoded, TrainConfig(batch_size=16), 0))
    shuffled = list(torch.randperm(1024).split(16))
    assert padding(batches) < padding([batch.tolist() for batch in shuffled]) / 3
    means = torch.tensor([float(lengths[batch].float().mean()) for batch in batches])
    trend = torch.corrcoef(torch.stack([means, torch.arange(64).float()]))[0, 1]
    assert abs(float(trend)) < 0.3
    # Sorting the whole epoch instead of windows would put one length, or two, into a batch.
    assert sum(len(lengths[batch].unique()) for batch in batches) / len(batches) > 2.5


def test_evaluation_batches_go_from_long_to_short():
    encoded = ragged(20)
    batches = list(length_sorted_batches(encoded, 6))
    assert sorted(index for batch in batches for index in batch) == list(range(20))
    ordered = [int(encoded.lengths[index]) for batch in batches for index in batch]
    assert ordered == sorted(ordered, reverse=True)


def test_no_batches_of_nothing():
    with pytest.raises(ValueError, match="no examples"):
        next(train_batches(ragged(2).select([]), TrainConfig(), 0))
