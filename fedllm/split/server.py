"""The gRPC server of split training: turns streams into seats of the current session.

A stream: the client opens it with ``open`` (its token, its version of fedllm), gets ``ready``, then goes through its
steps (see :mod:`fedllm.split.trainer`), says ``finish`` and gets ``bye``. Whatever goes wrong ends that one stream
with a ``failure`` frame that says what.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent import futures

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from fedllm import __version__
from fedllm.errors import SplitError
from fedllm.split.codec import ActivationCodec
from fedllm.split.endpoint import OPTIONS, Certificates, check_plain
from fedllm.split.frames import Packet, failure_frame, read_packets, to_frames
from fedllm.split.session import Seat, Session
from fedllm.split.split_pb2 import DescribeReply, DescribeRequest

OPEN, READY, FINISH, BYE = "open", "ready", "finish", "bye"
SERVICE = "fedllm.split.v1.Split"
TRAIN, DESCRIBE = f"/{SERVICE}/Train", f"/{SERVICE}/Describe"
_STOP_SECONDS = 2.0


class SplitServer:
    """Listens for the clients of one session at a time.

    Args:
        address: ``host:port``; port 0 takes a free one.
        certificates: of the server; None: no TLS, on loopback only.
        max_clients: streams at a time.
        max_packet_bytes: largest packet of a client.
        codec: how gradients and hidden states go down.
        model: name of the model, for :meth:`describe`.
        blocks: of the whole model.

    Raises:
        SplitError: the address cannot be used, a TLS file is missing, or TLS is but the address is not on loopback.
    """

    def __init__(
        self,
        address: str,
        certificates: Certificates | None = None,
        *,
        max_clients: int = 64,
        max_packet_bytes: int = 1 << 30,
        codec: ActivationCodec = "fp32",
        model: str = "",
        blocks: int = 0,
    ) -> None:
        self._codec: ActivationCodec = codec
        self._max_packet_bytes = max_packet_bytes
        self._description = DescribeReply(version=__version__, model=model, blocks=blocks)
        self._session: Session | None = None
        self._lock = threading.Lock()
        if certificates is None:
            check_plain(address)
        # Streams wait most of the time, but each of them in a thread; describe and health need some too.
        workers = futures.ThreadPoolExecutor(max_clients + 4, thread_name_prefix="split")
        # Without the option a second server would silently share the port with the first.
        self._server = grpc.server(workers, options=[*OPTIONS, ("grpc.so_reuseport", 0)])
        self._workers = workers
        self._server.add_generic_rpc_handlers([self._handlers()])
        self._health = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        self._health.set(SERVICE, health_pb2.HealthCheckResponse.SERVING)
        self.port = self._bind(address, certificates)
        self._server.start()

    def _bind(self, address: str, certificates: Certificates | None) -> int:
        try:
            if certificates is None:
                return self._server.add_insecure_port(address)
            return self._server.add_secure_port(address, certificates.server())
        except RuntimeError as error:
            raise SplitError(
                f"the split server cannot listen on {address}: {error}; is the port taken, or is this not an address "
                "of this machine?"
            ) from None

    def _handlers(self) -> grpc.GenericRpcHandler:
        return grpc.method_handlers_generic_handler(
            SERVICE,
            {
                # No serialisers: frames are bytes already, see fedllm.split.frames.
                "Train": grpc.stream_stream_rpc_method_handler(self._train),
                "Describe": grpc.unary_unary_rpc_method_handler(
                    lambda request, context: self._description,
                    request_deserializer=DescribeRequest.FromString,
                    response_serializer=DescribeReply.SerializeToString,
                ),
            },
        )

    def open(self, session: Session) -> None:
        """Let the clients of a session in; those of the one before are told that it is over."""
        with self._lock:
            before, self._session = self._session, session
        if before is not None:
            before.close("the round is over")

    def close(self) -> None:
        """End all streams, give the port back and wait until no thread is left."""
        with self._lock:
            session, self._session = self._session, None
        if session is not None:
            session.close("the split server has stopped")
        self._health.enter_graceful_shutdown()
        self._server.stop(_STOP_SECONDS).wait()
        self._workers.shutdown(wait=True, cancel_futures=True)

    def _train(self, frames: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        packets = read_packets(frames, self._max_packet_bytes)
        try:
            session, seat = self._admit(packets)
        except SplitError as error:
            yield failure_frame(str(error))
            return
        # A lost connection must free the seat at once, not when somebody next looks at the stream.
        lost = f"the connection to client {seat.ticket.node} was lost"
        if not context.add_callback(lambda: session.leave(seat, lost)):
            session.leave(seat, lost)
            return
        reader = threading.Thread(
            target=self._read, args=(session, seat, packets), name="split-reader", daemon=True
        )
        reader.start()
        yield from to_frames(Packet(READY))
        while (packet := session.next_answer(seat)) is not None:
            yield from to_frames(packet, self._codec)
        if seat.reason is None:
            yield from to_frames(Packet(BYE))
        else:
            yield failure_frame(seat.reason)

    def _admit(self, packets: Iterator[Packet]) -> tuple[Session, Seat]:
        opening = next(packets, None)
        if opening is None or opening.kind != OPEN:
            raise SplitError(
                f"a stream begins with {OPEN!r}, found {opening.kind if opening else 'its end'!r}"
            )
        version = opening.texts.get("version", "?")
        if version != __version__:
            raise SplitError(
                f"the client has fedllm {version}, the split server {__version__}; use one version"
            )
        session = self._session
        if session is None:
            raise SplitError("no round is open on this split server")
        return session, session.join(opening.texts.get("token", ""))

    def _read(self, session: Session, seat: Seat, packets: Iterator[Packet]) -> None:
        """Hand over what a client sends until it finishes or fails."""
        node = seat.ticket.node
        with contextlib.suppress(grpc.RpcError):
            try:
                for packet in packets:
                    if packet.kind == FINISH:
                        session.leave(seat)
                        return
                    session.put(seat, packet)
            except SplitError as error:
                session.leave(seat, f"client {node}: {error}")
                return
        session.leave(seat, f"client {node}: the stream ended before it had said {FINISH!r}")
