"""Whole runs of the second-order methods, with fedllm's own server and clients in one process."""

import pytest

from fedllm.errors import ConfigError
from tests.unit.test_server import flat, run  # noqa: F401

METHODS = [
    ("fagh", "gradient-and-hessian-row", {"fagh.rho": 500.0, "wire.upload-codec": "bf16"}),
    ("fagh", "gradient-and-hessian-row", {"fagh.preset": "paper"}),
    ("fagh-opt", "backprop-and-hessian-row", {"fagh-opt.rho": 100.0, "train.local-steps": 20}),
    ("sofim", "gradient", {"sofim.eta": 0.5}),
    ("sofim-opt", "backprop", {"train.local-steps": 20}),
    ("fedsgdm", "gradient", {"fedsgdm.eta": 1.0}),
    ("scaffold", "scaffold-sgd", {"train.learning-rate": 0.1}),
]


@pytest.mark.parametrize(("strategy", "client", "settings"), METHODS)
def test_a_run_lowers_the_loss(flat, strategy, client, settings):  # noqa: F811
    result = run(flat, strategy=strategy, client=client, rounds=3, **settings)
    losses = [metrics["loss"] for metrics in result.evaluate_metrics_serverapp.values()]
    assert min(losses[1:]) < losses[0]


def test_a_client_that_sends_no_gradient_is_refused(flat):  # noqa: F811
    with pytest.raises(ConfigError, match="set client to one of"):
        run(flat, strategy="fagh", client="backprop")
