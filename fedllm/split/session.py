"""Who takes part in the split training of a round, and where their steps meet the trainer's.

Streams come and go in threads of their own; the trainer is one more. A client that is late, lost or wrong gives up its
seat with a reason, and nobody waits for it any longer.
"""

from __future__ import annotations

import hmac
import threading
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

from fedllm.errors import SplitError
from fedllm.split.frames import Packet

_EXPECTED, _SEATED, _GONE = "expected", "seated", "gone"


@dataclass(frozen=True)
class Ticket:
    """A client's right to one stream in a round.

    Attributes:
        node: the client's name.
        token: secret that the client was given in its training message.
        cut: blocks on the client.
    """

    node: str
    token: str
    cut: int


@dataclass(eq=False)
class Seat:
    """A client in a round.

    Attributes:
        ticket: who it is.
        reason: why it left early; None while it is there, and after an orderly end.
        steps: steps that were answered.
    """

    ticket: Ticket
    reason: str | None = None
    steps: int = 0
    _state: str = _EXPECTED
    _since: float = 0.0
    _inbox: Packet | None = None
    _outbox: list[Packet] = field(default_factory=list)

    @property
    def gone(self) -> bool:
        """Whether the client takes part no longer."""
        return self._state == _GONE


class Session:
    """The seats of one round.

    Args:
        tickets: one for each client.
        join_timeout: seconds within which a client must have opened its stream.
        step_timeout: seconds that a client may take from an answer to its next packet.
        clock: for tests.
    """

    def __init__(
        self,
        tickets: Sequence[Ticket],
        *,
        join_timeout: float,
        step_timeout: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        now = clock()
        self.seats = [Seat(ticket, _since=now) for ticket in tickets]
        self._timeouts = {_EXPECTED: join_timeout, _SEATED: step_timeout}
        self._clock = clock
        self._changed = threading.Condition()

    # ------------------------------------------------------ the streams' side

    def join(self, token: str) -> Seat:
        """Take the seat of a token.

        Raises:
            SplitError: no such token in this round, or it has been used.
        """
        with self._changed:
            for seat in self.seats:
                if hmac.compare_digest(seat.ticket.token.encode(), token.encode()):
                    break
            else:
                raise SplitError(
                    "the token is not one of this round's: the round is over, or another server issued it"
                )
            if seat._state != _EXPECTED:
                raise SplitError(
                    f"the token of client {seat.ticket.node} has been used: one stream for each token"
                )
            seat._state, seat._since = _SEATED, self._clock()
            self._changed.notify_all()
            return seat

    def put(self, seat: Seat, packet: Packet) -> None:
        """Hand a client's packet to the trainer.

        Raises:
            SplitError: the client has not been answered yet, or does not take part any longer.
        """
        with self._changed:
            if seat.gone:
                raise SplitError(seat.reason or "the client has left")
            if seat._inbox is not None:
                raise SplitError(
                    f"{packet.kind} of step {packet.step} came before the answer to {seat._inbox.kind}"
                )
            seat._inbox = packet
            self._changed.notify_all()

    def next_answer(self, seat: Seat) -> Packet | None:
        """Wait for the trainer's answer to a client; None once the client takes part no longer."""
        with self._changed:
            self._changed.wait_for(lambda: seat._outbox or seat.gone)
            return seat._outbox.pop(0) if seat._outbox else None

    def leave(self, seat: Seat, reason: str | None = None) -> None:
        """Give up a seat; the first reason counts."""
        with self._changed:
            if not seat.gone:
                seat._state, seat.reason, seat._inbox = _GONE, reason, None
                self._changed.notify_all()

    # ----------------------------------------------------- the trainer's side

    def gather(self, kind: str, among: Collection[Seat] | None = None) -> list[tuple[Seat, Packet]]:
        """Wait until everyone who takes part has sent a packet, and take these; in the order of the seats.

        Args:
            kind: what is expected; a client that sends something else gives up its seat.
            among: the seats to wait for; None: all.

        Returns:
            Empty once nobody is left.
        """
        wanted = self.seats if among is None else among
        with self._changed:
            while waiting := [seat for seat in wanted if not seat.gone and seat._inbox is None]:
                left = min(self._time_left(seat) for seat in waiting)
                if left > 0:
                    self._changed.wait(min(left, 60.0))
                for seat in waiting:
                    if not seat.gone and seat._inbox is None and self._time_left(seat) <= 0:
                        self._expel_late(seat)
            found = []
            for seat in wanted:
                packet, seat._inbox = seat._inbox, None
                if packet is None:
                    continue
                if packet.kind != kind:
                    self._drop(seat, f"step {packet.step}: sent {packet.kind!r}, expected {kind!r}")
                    continue
                found.append((seat, packet))
            return found

    def answer(self, seat: Seat, packet: Packet) -> None:
        """Send a packet to a client; its time for the next one starts now."""
        with self._changed:
            if not seat.gone:
                seat._outbox.append(packet)
                seat._since = self._clock()
                seat.steps += packet.kind == "gradient"
                self._changed.notify_all()

    def close(self, reason: str) -> None:
        """Take the seats of all who are still there."""
        for seat in self.seats:
            self.leave(seat, reason)

    def _time_left(self, seat: Seat) -> float:
        return seat._since + self._timeouts[seat._state] - self._clock()

    def _expel_late(self, seat: Seat) -> None:
        limit = self._timeouts[seat._state]
        what = "did not open its stream" if seat._state == _EXPECTED else "sent nothing"
        self._drop(seat, f"client {seat.ticket.node} {what} within {limit:g} s")

    def _drop(self, seat: Seat, reason: str) -> None:
        seat._state, seat.reason, seat._inbox = _GONE, reason, None
        self._changed.notify_all()
