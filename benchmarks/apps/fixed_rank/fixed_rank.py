"""The baseline: FedAvg at one rank, batch size and width, on the nodes whose memory holds that."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.strategies.fedpipe import FedPipe

from fedllm.nodes import NodeInfo


class FixedRank(FedPipe):
    """Everyone trains the same adapter; a node that cannot hold all of it takes no part.

    Memory and time are FedPipe's models of them, so that both sides are judged by one measure. It is given one rank,
    one batch size and one width to choose from, no warm-up, and the plain mean of factors.
    """

    def select(
        self, server_round: int, nodes: Sequence[NodeInfo], count: int, purpose: str
    ) -> list[NodeInfo]:
        """Choose among the nodes that hold every weight."""
        assert self._plan is not None
        assert self._planner is not None
        whole = [node for node in nodes if self._plan.covers(node.name, self._planner.weights)]
        return super().select(server_round, whole, max(count * len(whole) // len(nodes), 1), purpose)
