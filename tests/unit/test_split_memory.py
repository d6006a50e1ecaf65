"""A client of split learning stays within its budget: the planned memory against what lives in its real steps."""

import pytest
import torch
from fedllm.clients.split import Split
from fedllm.strategies.fedpipe.plan import share_of
from fedllm.strategies.hsplitlora.cuts import ServerSide, plan_cut
from fedllm.strategies.hsplitlora.planning import planning_of
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

from fedllm import registry
from fedllm.encoded import Encoded
from fedllm.errors import PlanError
from fedllm.live_memory import LiveMemory
from fedllm.lora.importance import Importance
from fedllm.lora.plans import NodeBudget
from fedllm.models import load_bundle
from fedllm.split.frames import Packet
from fedllm.split.trainer import GRADIENT
from fedllm.tasks import get_task
from fedllm.tiny_models import build_tokenizer
from fedllm.update import TrainJob

BATCH, LENGTH, BLOCKS = 8, 48, 6


class Server:
    """Stands for the stream: answers every activation with a gradient of its shape."""

    bytes_up = bytes_down = 0

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def send(self, packet):
        self.hidden = packet.tensors["hidden"].detach()

    def receive(self, kind):
        assert kind == GRADIENT
        return Packet(GRADIENT, 1, {"hidden": torch.ones_like(self.hidden)}, {"loss": 1.0})

    def finish(self):
        return None


@pytest.fixture(scope="module", params=["llama", "bert"])
def flat(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    tokenizer = build_tokenizer(request.param)
    sizes = {
        "hidden_size": 96,
        "intermediate_size": 256,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 4,
    }
    if request.param == "llama":
        config = LlamaConfig(
            vocab_size=len(tokenizer), num_key_value_heads=2, max_position_embeddings=64, **sizes
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        task = "causal-lm"
    else:
        config = BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
        BertModel(config).save_pretrained(folder)
        task = "sequence-classification"
    tokenizer.save_pretrained(folder)
    return {
        "model.name": str(folder),
        "task": task,
        "strategy": "hsplitlora",
        "client": "split",
        "lora.rank": 8,
        "train.batch-size": BATCH,
        "train.local-steps": 2,
        "data.max-length": LENGTH,
        "data.labels": "" if task == "causal-lm" else "a,b,c",
    }


def planned(flat, kilobytes):
    """The plan of a fast node with this budget: nothing but memory decides."""
    config = registry.config_from_flat(flat)
    bundle = load_bundle(config, ("a", "b", "c") if config.task != "causal-lm" else ())
    spec, options = planning_of(config, bundle)
    alike = Importance({weight.name: 1.0 for weight in spec.weights})
    node = NodeBudget("0", 1e3 * kilobytes, 16, 1e15)
    return plan_cut(node, spec, alike, options, ServerSide(1e9), range(1, BLOCKS))


def live_bytes(flat, chosen):
    """Weights of a client with this plan, and the most that lives beside them during two real steps."""
    config = registry.config_from_flat({**flat, "model.blocks": chosen.cut})
    bundle = load_bundle(config, ("a", "b", "c") if config.task != "causal-lm" else ())
    bundle.load_adapter_state(share_of(bundle.initial_state, chosen.client.ranks), any_ranks=True)
    tokens = torch.randint(5, 30, (2 * BATCH, LENGTH), generator=torch.Generator().manual_seed(0)).tolist()
    labels = tokens if config.task == "causal-lm" else [row % 3 for row in range(2 * BATCH)]
    examples = Encoded.from_lists(tokens, labels)
    task, state = get_task(config.task), bundle.adapter_state()
    job = TrainJob(bundle, task, examples, config.train, 0, 1, "0", state, ask_importance=True)
    rule = Split(address="127.0.0.1:1", token="t")
    rule._stream = Server
    rule.run(job)  # what is made once in a process does not count
    weights = [*bundle.model.parameters(), *bundle.model.buffers()]
    memory = LiveMemory()
    memory.ignore(weights)
    with memory:
        rule.run(job)
    return memory.peak + sum(tensor.nbytes for tensor in weights)


@pytest.mark.parametrize("kilobytes", [9000, 11000, 14000, 20000, 40000])
def test_no_planned_client_lives_beyond_its_budget(flat, kilobytes):
    chosen = planned(flat, kilobytes)
    live = live_bytes(flat, chosen)
    assert live <= 1e3 * kilobytes
    assert 0.7 * chosen.client.predicted_bytes <= live, "the prediction is no mere bound"


def test_a_budget_below_every_cut_is_refused(flat):
    with pytest.raises(PlanError, match="cut after block 1, the first that is allowed"):
        planned(flat, 300)
