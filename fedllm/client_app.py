"""Flower ClientApp: ``clientapp = "fedllm.client_app:app"``.

Flower starts a process for every message, so nothing heavy is imported before one arrives, and nothing at all where the
node has a resident worker.
"""

from __future__ import annotations

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from fedllm.node.forward import WORKER_SOCKET, forward

app = ClientApp()


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Tell the server what this node has."""
    return _answer("describe", message, context)


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the adapter that the message carries."""
    return _answer("train", message, context)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Evaluate the adapter that the message carries."""
    return _answer("evaluate", message, context)


def _answer(action: str, message: Message, context: Context) -> Message:
    if WORKER_SOCKET in context.node_config:
        return forward(action, message, context)
    from fedllm import client

    return client.ANSWERS[action](message, context)
