"""A client's end of the split stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

import grpc

from fedllm import __version__
from fedllm.errors import SplitError
from fedllm.split.codec import ActivationCodec
from fedllm.split.endpoint import OPTIONS, Certificates, check_plain
from fedllm.split.frames import Packet, read_packets, to_frames
from fedllm.split.server import BYE, FINISH, OPEN, READY, TRAIN

_QUEUED_FRAMES = 16
_END = b""


class SplitStream:
    """One client's stream for one round; a context manager that closes the channel.

    Args:
        address: ``host:port`` of the split server.
        token: from the training message.
        certificates: whom to trust; None: no TLS, on loopback only.
        codec: how activations go up.
        connect_timeout: seconds within which the server must answer.
        step_timeout: seconds that the server may take for an answer.
        max_packet_bytes: largest packet of the server.

    Raises:
        SplitError: the server cannot be reached, or does not let this client in; the address is named.
    """

    def __init__(
        self,
        address: str,
        token: str,
        certificates: Certificates | None = None,
        *,
        codec: ActivationCodec = "fp32",
        connect_timeout: float = 30.0,
        step_timeout: float = 600.0,
        max_packet_bytes: int = 1 << 30,
    ) -> None:
        self._address = address
        self._codec: ActivationCodec = codec
        self._step_timeout = step_timeout
        if certificates is None:
            check_plain(address)
            self._channel = grpc.insecure_channel(address, options=OPTIONS)
        else:
            self._channel = grpc.secure_channel(address, certificates.client(), options=OPTIONS)
        self._outgoing: queue.Queue[bytes] = queue.Queue(_QUEUED_FRAMES)
        self._closed = threading.Event()
        self.bytes_up = self.bytes_down = 0
        try:
            self._wait_until_reachable(connect_timeout)
            # No serialisers: frames are bytes already, see fedllm.split.frames.
            method: Any = self._channel.stream_stream(TRAIN)
            self._call: Any = method(self._frames_up())
            self._packets = read_packets(self._frames_down(), max_packet_bytes)
            self.send(Packet(OPEN, texts={"token": token, "version": __version__}))
            self.receive(READY, connect_timeout)
        except BaseException:
            self.close()
            raise

    def _wait_until_reachable(self, seconds: float) -> None:
        try:
            grpc.channel_ready_future(self._channel).result(timeout=seconds)
        except grpc.FutureTimeoutError:
            raise SplitError(
                f"the split server at {self._address} did not answer within {seconds:g} s: is that the address under "
                "which this node reaches the server (hsplitlora.address), is its port open, and does this node trust "
                "its certificate?"
            ) from None

    def send(self, packet: Packet) -> None:
        """Queue a packet; waits while the network is behind.

        Raises:
            SplitError: the stream has ended; its reason is given.
        """
        for frame in to_frames(packet, self._codec):
            self.bytes_up += len(frame)
            while not self._closed.is_set():
                try:
                    self._outgoing.put(frame, timeout=0.5)
                    break
                except queue.Full:
                    if not self._call.is_active():
                        self._raise_end()

    def receive(self, kind: str, timeout: float | None = None) -> Packet:
        """Wait for the server's next packet.

        Args:
            kind: what it must be.
            timeout: seconds; None: the stream's step timeout.

        Raises:
            SplitError: another packet, none in time, or the end of the stream; with the server's reason.
        """
        seconds = self._step_timeout if timeout is None else timeout
        late = threading.Event()

        def give_up() -> None:
            late.set()
            self._call.cancel()

        timer = threading.Timer(seconds, give_up)
        timer.daemon = True
        timer.start()
        try:
            packet = next(self._packets, None)
        except grpc.RpcError as error:
            if late.is_set():
                raise SplitError(
                    f"the split server at {self._address} sent no {kind!r} within {seconds:g} s"
                ) from None
            raise SplitError(
                f"the stream to the split server at {self._address} broke: {_details(error)}"
            ) from None
        finally:
            timer.cancel()
        if packet is None:
            raise SplitError(f"the split server at {self._address} ended the stream, expected {kind!r}")
        if packet.kind != kind:
            raise SplitError(f"the split server sent {packet.kind!r}, expected {kind!r}")
        return packet

    def finish(self) -> None:
        """End in good order.

        Raises:
            SplitError: the server does not agree that all is well.
        """
        self.send(Packet(FINISH))
        self.receive(BYE)

    def close(self) -> None:
        """Give the connection back; safe to call twice."""
        self._closed.set()
        with self._outgoing.mutex:
            self._outgoing.queue.clear()
            self._outgoing.queue.append(_END)
            self._outgoing.not_empty.notify_all()
        self._channel.close()

    def __enter__(self) -> Self:
        """The stream itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the channel."""
        self.close()

    def _raise_end(self) -> None:
        """Say why the server ended the stream: its last frame, if there is one, tells."""
        self.receive(READY, 5.0)

    def _frames_up(self) -> Iterator[bytes]:
        while (frame := self._outgoing.get()) is not _END:
            yield frame

    def _frames_down(self) -> Iterator[bytes]:
        for frame in self._call:
            self.bytes_down += len(frame)
            yield frame


def _details(error: grpc.RpcError) -> str:
    code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
    details = error.details() if isinstance(error, grpc.Call) else ""
    return f"{code}: {details or 'no details'}"
