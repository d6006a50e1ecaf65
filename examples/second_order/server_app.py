"""An ordinary Flower server whose strategy is FAGH."""

import json
from pathlib import Path

import torch
from digits import build, test_examples
from fedllm.strategies.second_order.fagh import FAGH
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from torch.nn.functional import cross_entropy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Train, and judge every round on the test digits."""
    config = context.run_config
    model = build(str(config["network"]), int(config["seed"]))
    x, y = test_examples(str(config["mnist"]))
    accuracies: list[float] = []

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        model.load_state_dict(arrays.to_torch_state_dict())
        with torch.no_grad():
            logits = model(x)
        accuracies.append(float((logits.argmax(1) == y).double().mean()))
        print(f"round {server_round}: accuracy {accuracies[-1]:.4f}", flush=True)
        return MetricRecord({"accuracy": accuracies[-1], "loss": float(cross_entropy(logits, y))})

    strategy = FAGH(preset=str(config["preset"]), rho=float(config["rho"]), fraction_evaluate=0.0)
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(model.state_dict()),
        num_rounds=int(config["rounds"]),
        evaluate_fn=evaluate,
    )
    if config["out"]:
        Path(str(config["out"])).write_text(json.dumps({"accuracy": accuracies}), encoding="utf-8")
