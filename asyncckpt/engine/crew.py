"""Threads of the calling process that share a list of items: each takes the next until none is left or one failed."""

import errno
import threading
from collections.abc import Callable, Sequence
from typing import Generic, TypeVar

_POLL_S = 0.1

Item = TypeVar("Item")


class Crew(Generic[Item]):
    """`worker` is called once on each thread and returns what serves an item there, so that it may keep scratch memory."""

    def __init__(self, items: Sequence[Item], worker: Callable[[], Callable[[Item], None]]) -> None:
        self._items = items
        self._worker = worker
        self._lock = threading.Lock()
        self._next = 0
        self._error: BaseException | None = None
        self.failed = False
        """Whether an item failed: what is under way is needless."""

    def run(self, count: int, report: Callable[[], None] = lambda: None) -> None:
        """Serve all items on `count` threads, and call `report` on this one ten times a second and at the end.

        The first error ends the others and is raised; no thread is left behind.
        """
        threads = [threading.Thread(target=self._work, name=f"asyncckpt-fetch-{n}", daemon=True) for n in range(count)]
        try:
            if not start(threads):
                self._work()  # at the limit of threads: slower, not stuck
            for thread in threads:
                while thread.is_alive():
                    thread.join(_POLL_S)
                    report()
        except BaseException as error:
            self._stop(error)
            raise
        finally:
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            del self._worker  # it leads to whoever holds this crew, and to the memory of a whole state
            failure, self._error = self._error, None  # and so does its traceback
        if failure is not None:
            try:
                raise failure
            finally:
                del failure
        report()

    def _stop(self, error: BaseException) -> None:
        with self._lock:
            self._error = self._error or error
            self.failed = True

    def _take(self) -> Item | None:
        with self._lock:
            if self.failed or self._next == len(self._items):
                return None
            self._next += 1
            return self._items[self._next - 1]

    def _work(self) -> None:
        try:
            serve = self._worker()
            while (item := self._take()) is not None:
                serve(item)
        except BaseException as error:  # noqa: BLE001 - raised again by run(), on the caller's thread
            self._stop(error)


def start(threads: Sequence[threading.Thread]) -> int:
    """Start them: how many could be started; those behind the first that could not are not tried."""
    for number, thread in enumerate(threads):
        try:
            thread.start()
        except RuntimeError:
            return number
    return len(threads)


def lacks_room(error: Exception) -> bool:
    """Whether the system has no thread or process left for us: Python raises a RuntimeError where no thread starts."""
    return isinstance(error, RuntimeError) or (isinstance(error, OSError) and error.errno == errno.EAGAIN)
