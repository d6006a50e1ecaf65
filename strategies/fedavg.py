"""Federated averaging (McMahan et al., AISTATS 2017, arXiv 1602.05629), algorithm 1."""

from fedllm.strategy import BaseStrategy


class FedAvg(BaseStrategy):
    """Weighted mean of the clients' adapters (McMahan et al., 2017).

    All keywords are those of :class:`fedllm.strategy.BaseStrategy`; a ``server_optimizer`` turns it into FedOpt.
    """
