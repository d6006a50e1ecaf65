"""A client that answers with the gradient of its loss and a Hessian–vector product."""

from functools import cache

import torch
from digits import build, client_examples
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor
from torch.nn.functional import cross_entropy

from fedllm.curvature import gradient_and_hvp
from fedllm.errors import NonFiniteLossError
from fedllm.records import (
    ARRAYS,
    HESSIAN_DIRECTION,
    HESSIAN_ROW,
    LOSS_NOT_FINITE,
    METRICS,
    NUM_EXAMPLES,
    decode,
)

app = ClientApp()
examples = cache(client_examples)  # read once in a process


@app.train()
def train(message: Message, context: Context) -> Message:
    """Gradient and, if the server sends a direction, the Hessian's product with it, over all examples."""
    config, node = context.run_config, context.node_config
    model = build(str(config["network"]), int(config["seed"]))
    model.load_state_dict(message.content[ARRAYS].to_torch_state_dict())
    x, y = examples(
        str(config["mnist"]),
        int(node["partition-id"]),
        int(node["num-partitions"]),
        float(config["alpha"]),
        int(config["seed"]),
    )

    def loss(batch: tuple[Tensor, Tensor]) -> Tensor:
        return cross_entropy(model(batch[0]), batch[1])

    asked = message.content.get(HESSIAN_DIRECTION)
    try:
        found = gradient_and_hvp(
            loss,
            dict(model.named_parameters()),
            [((a, b), len(b)) for a, b in zip(x.split(256), y.split(256), strict=True)],
            None if asked is None else decode(asked),
        )
    except NonFiniteLossError:  # the server may take back the step that led here
        zeros = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
        metrics = MetricRecord({NUM_EXAMPLES: len(y), LOSS_NOT_FINITE: 1})
        return Message(RecordDict({ARRAYS: ArrayRecord(zeros), METRICS: metrics}), reply_to=message)
    content = RecordDict(
        {
            ARRAYS: ArrayRecord(found.gradient),
            METRICS: MetricRecord({NUM_EXAMPLES: len(y), "loss": found.loss}),
        }
    )
    if found.product is not None:
        content[HESSIAN_ROW] = ArrayRecord(found.product)
    return Message(content, reply_to=message)
