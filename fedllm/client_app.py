"""Flower ClientApp: ``clientapp = "fedllm.client_app:app"``.

Nothing heavy is imported before a message arrives.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Tell the server what this node has."""
    from fedllm import client

    return client.describe(message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter that the message carries."""
    from fedllm import client

    return client.train(message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter that the message carries."""
    from fedllm import client

    return client.evaluate(message, context)
