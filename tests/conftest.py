"""Settings for all tests: no telemetry, a private Flower home, a task identity as Flower sets it in a ServerApp."""

import logging
import os
import tempfile
from collections.abc import Iterator

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("FLWR_HOME", tempfile.mkdtemp(prefix="fedllm-test-flwr-"))

import pytest
import torch
from flwr.supercore.task_identity import (
    TaskIdentity,
)  # flwr's processes set it; messages cannot be made without

TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1


@pytest.fixture(autouse=True)
def _few_threads() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_logging() -> Iterator[None]:
    """The command line and the server set up fedllm's logger; no later test may see that."""
    log = logging.getLogger("fedllm")
    level, handlers = log.level, list(log.handlers)
    yield
    log.setLevel(level)
    log.handlers[:] = handlers
