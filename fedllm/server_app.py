"""Flower ServerApp: ``serverapp = "fedllm.server_app:app"``."""

from __future__ import annotations

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run the configured strategy and leave a run folder."""
    from fedllm import logs, server

    with logs.bound(run_id=str(context.run_id)):
        server.run(grid, context.run_config)
