"""The client: every message loads the model and tokenises the partition, as Flower's LLM examples do."""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from peft import get_peft_model_state_dict, set_peft_model_state_dict
from task import get_loader, get_model, load_partition, train

app = ClientApp()


@app.train()
def train_message(msg: Message, context: Context) -> Message:
    """Train on this client's partition."""
    config = context.run_config
    model = get_model(config)
    set_peft_model_state_dict(model, msg.content["arrays"].to_torch_state_dict())
    rows = load_partition(config, int(context.node_config["partition-id"]))
    loader = get_loader(config, rows, int(config["batch-size"]), shuffle=True)
    loss = train(model, loader, config)
    content = RecordDict(
        {
            "arrays": ArrayRecord(get_peft_model_state_dict(model)),
            "metrics": MetricRecord({"train_loss": loss, "num-examples": len(rows)}),
        }
    )
    return Message(content=content, reply_to=msg)
