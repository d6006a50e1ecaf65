"""Health check of a container: ask Flower's gRPC health service, and the worker's socket where one is given.

Usage: python health.py HOST:PORT [SOCKET]; exit code 0 if all answer.
"""

import sys

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

TIMEOUT = 3.0


def serving(target: str) -> bool:
    """Whether the gRPC server at a target says that it serves."""
    with grpc.insecure_channel(target) as channel:
        try:
            answer = HealthStub(channel).Check(HealthCheckRequest(), timeout=TIMEOUT)
        except grpc.RpcError as error:
            print(f"{target}: {error.code().name}: {error.details()}", file=sys.stderr)
            return False
    return bool(answer.status == HealthCheckResponse.SERVING)


if __name__ == "__main__":
    address, *sockets = sys.argv[1:]
    sys.exit(not all(serving(target) for target in [address, *(f"unix:{path}" for path in sockets)]))
