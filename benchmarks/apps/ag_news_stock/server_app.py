"""The server: Flower's FedAvg, the global model evaluated after every round."""

import json
import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from task import get_loader, get_model, load_test_rows, test

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds; writes accuracy and clock time after each of them, round 0 first."""
    config = context.run_config
    torch.manual_seed(int(config["seed"]))
    model = get_model(config)
    loader = get_loader(config, load_test_rows(config), int(config["evaluate-batch-size"]), shuffle=False)
    figures: dict[str, list[float]] = {"accuracy": [], "time": []}

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        set_peft_model_state_dict(model, arrays.to_torch_state_dict())
        figures["accuracy"].append(test(model, loader))
        figures["time"].append(time.time())
        return MetricRecord({"accuracy": figures["accuracy"][-1]})

    strategy = FedAvg(
        fraction_train=float(config["fraction-train"]),
        fraction_evaluate=0.0,
        min_available_nodes=int(config["clients"]),
    )
    strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(get_peft_model_state_dict(model)),
        num_rounds=int(config["rounds"]),
        evaluate_fn=evaluate,
    )
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    Path(str(config["out"])).write_text(json.dumps({**figures, "parameters": trained}))
