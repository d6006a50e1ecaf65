"""The jobs of a worker: one at a time in order of arrival, some that wait, and those that nobody wants any more."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from flwr.app import RecordDict

from fedllm import interruption
from fedllm.errors import WorkerError
from fedllm.node.messages import Job


class StoppingError(WorkerError):
    """The worker ends; the job was not begun and may go to another worker."""


class Ticket:
    """A job on its way; the thread that waits for it and the one that does it meet here.

    Attributes:
        job: what to do.
        answer: the reply's content, once :meth:`wait` has returned and nothing went wrong.
        failure: class name and text of what went wrong, else None.
        begun: whether the job was ever begun.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.answer = RecordDict()
        self.failure: tuple[str, str] | None = None
        self.begun = False
        self._left_queue, self._settled = threading.Event(), threading.Event()

    def begin(self) -> None:
        """Say that the job runs now."""
        self.begun = True
        self._left_queue.set()

    def succeed(self, answer: RecordDict) -> None:
        """Hand over the reply's content."""
        self.answer = answer
        self._settle()

    def fail(self, error: BaseException) -> None:
        """Say what went wrong; the exception itself, which holds on to the job's memory, is not kept."""
        self.failure = type(error).__name__, str(error)
        self._settle()

    def wait_for_turn(self) -> None:
        """Wait until the job runs, or never will."""
        self._left_queue.wait()

    def wait(self) -> None:
        """Wait until the job is over."""
        self._settled.wait()

    def _settle(self) -> None:
        self._left_queue.set()
        self._settled.set()


class JobQueue:
    """Jobs that wait, and the one that runs.

    Args:
        most: jobs that may wait.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._waiting: deque[Ticket] = deque()
        self._running: Ticket | None = None
        self._closed = False
        self._changed = threading.Condition()

    def __len__(self) -> int:
        return len(self._waiting)

    def put(self, job: Job) -> Ticket:
        """Let a job wait for its turn.

        Raises:
            StoppingError: the worker ends.
            WorkerError: too many wait already.
        """
        ticket = Ticket(job)
        with self._changed:
            if self._closed:
                raise StoppingError("the worker is stopping")
            if len(self._waiting) >= self._most:
                raise WorkerError(
                    f"the worker is busy and {self._most} messages wait for it already; send this node fewer at a time"
                )
            self._waiting.append(ticket)
            self._changed.notify()
        return ticket

    def cancel(self, ticket: Ticket) -> None:
        """Nobody waits for this job any more: it never begins, stops at its next batch, or is over anyway."""
        with self._changed:
            if ticket in self._waiting:
                self._waiting.remove(ticket)
                ticket.fail(WorkerError("nobody waits for the job any more"))
            elif ticket is self._running:
                interruption.interrupt()

    def run(self, do: Callable[[Job], RecordDict]) -> bool:
        """Wait for a job and do it in this thread; what it raises goes to the one who waits for it.

        Returns:
            Whether there may be more; False: the queue was closed.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return False
            ticket = self._running = self._waiting.popleft()
            interruption.start_anew()
        ticket.begin()
        try:
            ticket.succeed(do(ticket.job))
        except Exception as error:
            ticket.fail(error)
        except BaseException:
            ticket.fail(WorkerError("the worker was stopped in the middle of the job"))
            raise
        finally:
            with self._changed:
                self._running = None
        return True

    def close(self) -> None:
        """Take no more jobs and send away those that wait."""
        with self._changed:
            self._closed = True
            while self._waiting:
                self._waiting.popleft().fail(StoppingError("the worker is stopping"))
            self._changed.notify_all()
