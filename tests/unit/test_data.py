"""Data: sources, cleaning, splits, caches, and errors that name the file, the column and what to do."""

from __future__ import annotations

import json
import logging
import os
import time
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import fedllm.data_sources
import fedllm.tasks
from fedllm import data
from fedllm.config import RunConfig
from fedllm.errors import ConfigError, DataError
from fedllm.token_cache import tokenizer_fingerprint

SHARED = Path(__file__).parents[3] / "shared" / "data"
LABELS = ("sports", "business", "world")


@pytest.fixture(autouse=True)
def fresh_caches(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "user cache"))
    data.clear_data_caches()
    yield
    data.clear_data_caches()


def make_tokenizer(extra: str = "") -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[EOS]", *(f"w{number}" for number in range(200)), *extra.split()]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]", eos_token="[EOS]"
    )


def make_rows(count: int = 90) -> list[dict[str, str]]:
    return [
        {"text": f"w{i % 200} w{i % 7}", "label": LABELS[i % 3], "owner": f"o{i % 5}"} for i in range(count)
    ]


def write(path: Path, rows: list[dict[str, object]]) -> Path:
    frame = pd.DataFrame(rows)
    if path.suffix == ".csv":
        frame.to_csv(path, index=False)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        path.write_text(json.dumps(rows))
    return path


def config_of(source: Path | str, **options: object) -> RunConfig:
    flat = {
        name.replace("_", "-"): str(value) if isinstance(value, Path) else value
        for name, value in options.items()
    }
    top = {name: flat.pop(name) for name in ("task", "seed", "evaluation.generate") if name in flat}
    return RunConfig.from_flat(
        {"data.source": str(source), **{f"data.{k}": v for k, v in flat.items()}, **top}
    )


def texts(config: RunConfig, clients: int = 1) -> list[str]:
    return [
        text for i in range(clients) for text in data.load_client_rows(config, i, clients).columns["text"]
    ]


# --- files ---


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".parquet"])
def test_every_file_type_gives_the_same_rows(tmp_path, suffix):
    rows = make_rows()
    config = config_of(write(tmp_path / f"x{suffix}", rows), test_fraction=0)
    assert data.label_names(config) == ("business", "sports", "world")
    found = data.load_client_rows(config, 0, 1).columns
    assert Counter(zip(found["text"], found["label"], strict=True)) == Counter(
        (r["text"], r["label"]) for r in rows
    )


def test_csv_texts_stay_as_they_are(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('\ufefftext,label\nNA,a\n"two\nlines, ""quoted""",b\n007,a\nnull,b\n', encoding="utf-8")
    assert sorted(texts(config_of(path, test_fraction=0))) == ["007", "NA", "null", 'two\nlines, "quoted"']


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.csv", None, r"x\.csv does not exist"),
        ("x.csv", "", r"x\.csv is empty"),
        ("x.csv", "text,label\n", r"x\.csv has no rows"),
        ("x.csv", "Text,label\na,b\n", r"no column 'text' \(data\.text-column\); found Text, label; did"),
        ("x.csv", "text,topic\na,b\n", r"no column 'label' \(data\.label-column\); found text, topic"),
        ("x.csv", "text,label\na,b,c\n", r"more fields than its header"),
        ("x.csv", "text,label\na,b\na,b,c\n", r"(more fields|Expected 2 fields)"),
        ("x.csv", b"text,label\n\xff\xfe,b\n", r"x\.csv cannot be read: UnicodeDecodeError"),
        ("x.jsonl", '{"text": "a", "label": "b"}\n{"text":\n', r"x\.jsonl, line 2: not a JSON object"),
        ("x.jsonl", "[1]\n", r"row 1: expected an object, found list"),
        ("x.jsonl", "\n", r"no rows"),
        ("x.json", '{"text": "a"}', r"expected an array of objects, found dict"),
        ("x.json", "[", r"x\.json cannot be read"),
        ("x.parquet", b"junk", r"x\.parquet cannot be read"),
        ("x.txt", "a", r"x\.txt: expected one of the types \.csv, \.jsonl, \.json, \.parquet"),
        ("x.csv", "text,label\na,a\nb,\nc,b\nd, \n", r"row 2 has no value in column 'label'.* 2 rows"),
        ("x.csv", "text,label\na,a\nb,a\n", r"at least two classes, found a"),
        ("x.csv", "text,label\n,a\n ,b\n", r"all 2 rows are blank in text"),
    ],
)  # fmt: skip
def test_bad_files_are_told(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=message):
        data.check_data(config_of(path, test_fraction=0), 1)


@pytest.mark.parametrize("source", ["./nowhere", "/nowhere/at/all", "~/x.txt", "a/b/c"])
def test_paths_without_a_known_type_are_not_sent_to_the_hub(source):
    with pytest.raises(DataError):
        data.check_data(config_of(source), 1)


def test_rows_without_text_are_left_out_and_counted(tmp_path, caplog):
    rows = [*make_rows(6), {"text": "  ", "label": "sports"}, {"text": None, "label": "world"}]
    config = config_of(write(tmp_path / "x.jsonl", rows), test_fraction=0)
    assert len(texts(config)) == 6
    assert "left out 2 rows that are blank in text" in caplog.text


# --- labels ---


def test_configured_labels_give_the_order_and_may_be_given_by_index(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "w1", "label": 1}, {"text": "w2", "label": "low"}])
    config = config_of(path, test_fraction=0, labels="low,high")
    rows = data.load_client_rows(config, 0, 1).columns
    assert dict(zip(rows["text"], rows["label"], strict=True)) == {"w1": "high", "w2": "low"}
    assert data.label_names(config) == ("low", "high")


def test_integer_labels_are_sorted_by_value(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"text": "w1", "label": value} for value in (10, 2, 1)])
    assert data.label_names(config_of(path)) == ("1", "2", "10")


def test_unknown_labels_name_row_and_file(tmp_path):
    path = write(tmp_path / "x.csv", make_rows(6))
    with pytest.raises(
        DataError, match=r"row 1 of .*x\.csv has the label 'sports'; known classes are world, business"
    ):
        data.check_data(config_of(path, labels="world,business"), 1)
    with pytest.raises(DataError, match=r"data\.labels: the class 'a' occurs more than once"):
        data.check_data(config_of(path, labels="a,a"), 1)


# --- splits ---


def test_test_rows_are_held_out_by_class(tmp_path):
    rows = [{"text": f"w{i}", "label": "rare" if i % 10 == 0 else "common"} for i in range(200)]
    path = write(tmp_path / "x.csv", rows)
    config = config_of(path, test_fraction=0.2)
    summary = data.check_data(config, 4)
    assert (summary.rows, summary.test_rows) == (160, 40)
    assert summary.labels == {"common": 144, "rare": 16}
    assert summary.majority_share == pytest.approx(0.9)
    assert summary.client_rows == (40, 40, 40, 40)
    train, test = set(texts(config, 4)), data.test_examples(config, make_tokenizer())
    held_out = {f"w{i}" for i in range(200)} - train
    assert len(held_out) == len(test) == 40
    assert set(texts(config_of(path, test_fraction=0.2, seed=1), 4)) != train


def test_no_test_rows_if_none_are_asked_for(tmp_path):
    config = config_of(write(tmp_path / "x.csv", make_rows()), test_fraction=0)
    assert data.test_examples(config, make_tokenizer()) is None
    assert data.check_data(config, 2).test_rows == 0


def test_test_file_and_limits(tmp_path):
    source, test = write(tmp_path / "x.csv", make_rows(90)), write(tmp_path / "t.csv", make_rows(30))
    config = config_of(source, test_file=test, train_rows=50, test_rows=7)
    summary = data.check_data(config, 5)
    assert (summary.rows, summary.test_rows) == (50, 7)
    assert sorted(texts(config, 5)) == sorted(row["text"] for row in make_rows(50))
    limited = data.check_data(config_of(source, test_file=test, max_rows_per_label=4), 2)
    assert (limited.labels, limited.test_rows) == ({"business": 4, "sports": 4, "world": 4}, 30)


def test_a_test_file_with_an_unknown_label_is_refused(tmp_path):
    source = write(tmp_path / "x.csv", make_rows(9))
    test = write(tmp_path / "t.csv", [{"text": "w1", "label": "weather"}])
    with pytest.raises(DataError, match=r"row 1 of .*t\.csv has the label 'weather'"):
        data.check_data(config_of(source, test_file=test), 2)


def test_a_server_with_test_file_and_labels_needs_no_training_file(tmp_path):
    test = write(tmp_path / "t.csv", make_rows(9))
    config = config_of(tmp_path / "only on nodes.csv", test_file=test, labels="sports,business,world")
    assert len(data.test_examples(config, make_tokenizer())) == 9
    assert data.label_names(config) == LABELS


def test_clients_share_all_rows(tmp_path):
    config = config_of(write(tmp_path / "x.csv", make_rows()), partitioner="dirichlet", test_fraction=0)
    sizes = data.partition_sizes(config, 4)
    assert sum(sizes) == 90
    assert Counter(texts(config, 4)) == Counter(row["text"] for row in make_rows())
    counts = [data.label_counts(config, i, 4) for i in range(4)]
    assert [sum(count.values()) for count in counts] == sizes
    assert all(list(count) == list(data.label_names(config)) for count in counts)
    with pytest.raises(DataError, match=r"from 0 to num-partitions - 1 = 3, found 4"):
        data.load_client_rows(config, 4, 4)


def test_natural_ids_come_from_their_column(tmp_path):
    path = write(tmp_path / "x.csv", make_rows())
    config = config_of(path, partitioner="natural-id", id_column="owner", test_fraction=0)
    for client in range(5):
        assert set(data.load_client_rows(config, client, 5).columns["owner"]) == {f"o{client}"}
    with pytest.raises(DataError, match=r"5 different ids"):
        data.check_data(config, 3)
    with pytest.raises(DataError, match=r"data\.id-column"):
        data.check_data(config_of(path, partitioner="natural-id"), 5)
    with pytest.raises(DataError, match=r"no column 'user' \(data\.id-column\)"):
        data.check_data(config_of(path, partitioner="natural-id", id_column="user"), 5)


def test_a_nodes_own_file_is_all_its_own(tmp_path):
    own = write(tmp_path / "own.csv", make_rows(10))
    config = config_of(tmp_path / "absent.csv", labels="sports,business,world")
    assert len(data.client_examples(config, make_tokenizer(), 0, 1, str(own))) == 10
    assert data.label_counts(config, 0, 1, str(own)) == {"sports": 4, "business": 3, "world": 3}
    with pytest.raises(DataError, match=r"own\.csv.*set data\.labels"):
        data.client_examples(config_of(own), make_tokenizer(), 0, 1, str(own))
    with pytest.raises(DataError, match=r"gone\.csv does not exist"):
        data.client_examples(config, make_tokenizer(), 0, 1, str(tmp_path / "gone.csv"))


# --- causal language model ---


def test_causal_lm_reads_prompts_and_may_partition_by_label(tmp_path):
    rows = [{"q": f"w{i}", "a": f"w{i + 1}", "topic": LABELS[i % 3]} for i in range(60)]
    options = {"task": "causal-lm", "prompt_column": "q", "response_column": "a"}
    path = write(tmp_path / "x.jsonl", [*rows, {"q": "w1", "a": "", "topic": "world"}])
    config = config_of(
        path, **options, partitioner="pathological", classes_per_client=1, label_column="topic"
    )
    assert data.label_names(config) == ()
    assert data.label_counts(config, 0, 3) == {}
    summary = data.check_data(config, 3)
    assert (summary.rows, summary.labels, summary.majority_share) == (54, {}, None)
    assert len(set(data.load_client_rows(config, 0, 3).columns["topic"])) == 1
    assert data.client_examples(config, make_tokenizer(), 0, 3).has_token_labels
    with pytest.raises(DataError, match=r"no column 'label' \(data\.label-column\)"):
        data.check_data(config_of(path, **options, partitioner="shard"), 3)


def test_generation_is_checked_beforehand(tmp_path):
    path = write(tmp_path / "x.csv", make_rows())
    with pytest.raises(ConfigError, match=r"evaluation\.generate"):
        data.check_data(config_of(path, **{"evaluation.generate": 3}), 2)


# --- packaged ---


def test_chatterbot_topics():
    pytest.importorskip("chatterbot_corpus")
    summary = data.check_data(config_of("packaged:chatterbot"), 10)
    assert {"ai", "coding", "trivia"} < set(summary.labels)
    assert min(summary.labels.values()) >= 0.9 * 40 - 1
    everything = texts(config_of("packaged:chatterbot", test_fraction=0), 2)
    assert len(everything) == len(set(everything)) == summary.rows + summary.test_rows
    assert all(text == text.strip() and text for text in everything)
    few = data.check_data(
        config_of("packaged:chatterbot", labels="food,ai", partitioner="natural-id", id_column="source"), 2
    )
    assert list(few.labels) == ["food", "ai"]
    with pytest.raises(DataError, match=r"no topic 'cooking' \(data\.labels\); its topics are ai, "):
        data.check_data(config_of("packaged:chatterbot", labels="ai,cooking"), 2)


def test_chatterbot_questions_and_answers():
    pytest.importorskip("chatterbot_corpus")
    config = config_of("packaged:chatterbot", task="causal-lm", test_fraction=0)
    rows = data.load_client_rows(config, 0, 1).columns
    pairs = dict(zip(rows["prompt"], rows["response"], strict=True))
    assert pairs["Who was the 37th President of the United States?"] == "Richard Nixon"
    assert pairs["What year was President John F. Kennedy assassinated?"] == "1963"
    assert len(pairs) == len(rows["prompt"]) > 500


def test_packaged_data_that_is_not_there(monkeypatch):
    with pytest.raises(DataError, match=r"expected packaged:chatterbot, found 'packaged:nothing'"):
        data.check_data(config_of("packaged:nothing"), 2)
    monkeypatch.setattr("fedllm.chatterbot.find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"pip install \"fedllm\[demo\]\""):
        data.check_data(config_of("packaged:chatterbot"), 2)


# --- hub ---


@pytest.fixture
def fake_hub(monkeypatch):
    import datasets

    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["neg", "pos", "unsure"])}
    )

    def load_dataset(path, *, name, split):
        assert (path, name) == ("owner/reviews", None)
        if split not in ("train", "test"):
            raise ValueError(f"Unknown split \"{split}\". Should be one of ['train', 'test'].")
        size = 40 if split == "train" else 10
        rows = {"text": [f"w{i}" for i in range(size)], "label": [i % 2 for i in range(size)]}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(fedllm.data_sources, "_ask_hub", lambda name: None)


def test_hub_datasets_bring_splits_and_class_names(fake_hub):
    config = config_of("owner/reviews")
    summary = data.check_data(config, 4)
    assert (summary.rows, summary.test_rows) == (40, 10)
    assert summary.labels == {"neg": 20, "pos": 20, "unsure": 0}
    assert data.test_examples(config, make_tokenizer()).labels.tolist() == [0, 1] * 5
    held_out = data.check_data(config_of("owner/reviews", test_split="", test_fraction=0.25), 4)
    assert (held_out.rows, held_out.test_rows) == (30, 10)
    with pytest.raises(DataError, match=r"owner/reviews.*Should be one of.*data\.test-split"):
        data.check_data(config_of("owner/reviews", test_split="validation"), 4)
    with pytest.raises(DataError, match=r"dataset 'owner/reviews', split 'train' has no column 'body'"):
        data.check_data(config_of("owner/reviews", text_column="body"), 4)


def test_an_unreachable_hub_is_told_fast(monkeypatch):
    import httpx
    import huggingface_hub

    def dataset_info(self, name, *, timeout):
        raise httpx.ConnectError("Name or service not known")

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: False)
    monkeypatch.setattr(huggingface_hub.HfApi, "dataset_info", dataset_info)
    with pytest.raises(DataError, match=r"hub cannot be reached.*packaged:chatterbot or a local file"):
        data.check_data(config_of("owner/reviews"), 2)


def test_offline_mode_is_told_fast(monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "is_offline_mode", lambda: True)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"owner/no-such-reviews.*packaged:chatterbot or a local file"):
        data.check_data(config_of("owner/no-such-reviews"), 2)


# --- caches ---


@pytest.fixture
def encodings(monkeypatch) -> list[int]:
    """Row counts of the calls that really tokenise."""
    calls: list[int] = []
    original = fedllm.tasks.SequenceClassification.encode

    def encode(self, rows, *rest):
        calls.append(len(rows["text"]))
        return original(self, rows, *rest)

    monkeypatch.setattr(fedllm.tasks.SequenceClassification, "encode", encode)
    return calls


def test_ten_clients_tokenise_once_and_a_second_process_not_at_all(tmp_path, encodings):
    config, tokenizer = config_of(write(tmp_path / "x.csv", make_rows()), test_fraction=0), make_tokenizer()
    examples = [data.client_examples(config, tokenizer, i, 10) for i in range(10)]
    assert encodings == [90]
    data.clear_data_caches()
    again = [data.client_examples(config, make_tokenizer(), i, 10) for i in range(10)]
    assert encodings == [90]
    for first, second in zip(examples, again, strict=True):
        assert torch.equal(first.input_ids, second.input_ids)
        assert torch.equal(first.labels, second.labels)
    direct = tokenizer(data.load_client_rows(config, 3, 10).columns["text"])["input_ids"]
    assert [examples[3].example(i)[0].tolist() for i in range(9)] == direct


@pytest.mark.parametrize("change", ["content", "max-length", "tokenizer", "labels", "template"])
def test_whatever_matters_is_part_of_the_cache_key(tmp_path, encodings, change):
    path, tokenizer = write(tmp_path / "x.csv", make_rows()), make_tokenizer()
    options = {"test_fraction": 0, "labels": "sports,business,world", "max_length": 8}
    data.client_examples(config_of(path, **options), tokenizer, 0, 2)
    if change == "content":
        status = path.stat()
        path.write_text(path.read_text().replace("w3 w3", "w3 w4"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))  # even within a clock tick
    elif change == "max-length":
        options["max_length"] = 9
    elif change == "labels":
        options["labels"] = "business,sports,world"
    elif change == "template":
        tokenizer.chat_template = "{{ messages }}"
    else:
        tokenizer = make_tokenizer("another")
    data.client_examples(config_of(path, **options), tokenizer, 0, 2)
    assert encodings == [90, 90]


def test_how_rows_are_dealt_is_not_part_of_the_cache_key(tmp_path, encodings):
    path, tokenizer = write(tmp_path / "x.csv", make_rows()), make_tokenizer()
    for options in ({}, {"partitioner": "dirichlet"}, {"seed": 4}):
        data.client_examples(config_of(path, test_fraction=0, **options), tokenizer, 0, 2)
    assert encodings == [90]


def test_a_tokenizers_identity_survives_its_use():
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    tokenizer(["w1 w2", "w3"], truncation=True, max_length=1, padding=True)
    other = make_tokenizer()
    other(["w1 w2", "w3"], truncation=True, max_length=1, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == tokenizer_fingerprint(other) == before
    tokenizer.add_tokens(["new"])
    assert tokenizer_fingerprint(tokenizer) != before


@pytest.mark.parametrize(
    "damage", [lambda content: content[:-7], lambda content: b"", lambda content: b"x" * 99]
)
def test_a_damaged_cache_file_is_rebuilt_with_a_warning(tmp_path, caplog, damage):
    cache = tmp_path / "cache"
    config = config_of(write(tmp_path / "x.csv", make_rows()), cache_dir=cache, test_fraction=0)
    good = data.client_examples(config, make_tokenizer(), 0, 2)
    (file,) = cache.glob("*.safetensors")
    content = file.read_bytes()
    file.write_bytes(damage(content))
    data.clear_data_caches()
    assert torch.equal(data.client_examples(config, make_tokenizer(), 0, 2).input_ids, good.input_ids)
    assert "tokenising again" in caplog.text
    assert file.read_bytes() == content
    assert not list(cache.glob("*.tmp"))


def test_an_unusable_cache_folder_costs_time_only(tmp_path, caplog):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    config = config_of(write(tmp_path / "x.csv", make_rows()), cache_dir=blocked / "cache", test_fraction=0)
    assert len(data.client_examples(config, make_tokenizer(), 0, 2)) == 45
    assert "data.cache-dir" in caplog.text


def test_a_changed_file_is_read_again(tmp_path):
    path = write(tmp_path / "x.csv", make_rows(30))
    config = config_of(path, test_fraction=0)
    assert sum(data.partition_sizes(config, 2)) == 30
    write(path, make_rows(60))
    assert sum(data.partition_sizes(config, 2)) == 60


def test_nothing_is_printed(tmp_path, capfd, caplog):
    caplog.set_level(logging.CRITICAL)
    config = config_of(write(tmp_path / "x.csv", make_rows()), partitioner="dirichlet")
    data.check_data(config, 3)
    data.client_examples(config, make_tokenizer(), 0, 3)
    assert capfd.readouterr() == ("", "")


def test_summary_lines():
    summary = data.DataSummary("x.csv", 1000, 100, {"a": 600, "b": 400}, 0.6, (400, 600))
    assert list(summary.lines()) == [
        ("data", "x.csv: 1,000 training rows, 100 test rows"),
        ("classes", "a 600, b 400 (largest: 60.0% of the test rows)"),
        ("clients", "2 with 400 to 600 rows each"),
    ]


# --- real data ---


@pytest.mark.parametrize(
    ("folder", "options", "classes"),
    [
        ("ag_news", {}, 4),
        ("hate_speech", {}, 3),
        ("e2e_nlg", {"task": "causal-lm", "prompt_column": "mr", "response_column": "ref"}, 0),
    ],
)
def test_real_files(folder, options, classes):
    path = SHARED / folder / "train.csv"
    if not path.exists():
        pytest.skip("the shared data is not here")
    started = time.perf_counter()
    summary = data.check_data(config_of(path, test_file=path.with_name("test.csv"), **options), 10)
    assert time.perf_counter() - started < 10
    assert len(summary.labels) == classes
    assert sum(summary.client_rows) == summary.rows > 4000
