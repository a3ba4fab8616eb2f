"""Requests that serve one purpose, such as one save: they are given up together."""

import threading
import time
from collections.abc import Callable

from asyncckpt.events import StoreRetried

_CLEANUP_S = 60.0  # for everything that an errand left half done


class Errand:
    """What a `RetryingStore` asks, instead of a deadline of each request, whether to try again. Thread-safe.

    Args:
        failing: A request begins to fail, and the try that failed was sent at this moment (monotonic seconds); told when none failed before.
        eased: No request fails any more.
        acknowledged: A put or a part was acknowledged.
        retried: A request is tried again; None leaves it to the store to tell.
        is_late: Whether it is time to give up, where nobody else calls `give_up`.
    """

    def __init__(
        self,
        *,
        failing: Callable[[float], None] = lambda _: None,
        eased: Callable[[], None] = lambda: None,
        acknowledged: Callable[[], None] = lambda: None,
        retried: Callable[[StoreRetried], None] | None = None,
        is_late: Callable[[], bool] = lambda: False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.acknowledged = acknowledged
        self.retried = retried
        self._tell_failing = failing
        self._tell_eased = eased
        self._is_late = is_late
        self._clock = clock
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._failing = 0
        self._cleanup_end_s: float | None = None

    @property
    def given_up(self) -> bool:
        """Whether no request is worth another try, or a first one."""
        return self._over.is_set() or self._is_late()

    def give_up(self) -> None:
        """End every wait between two tries."""
        self._over.set()

    def sleep(self, seconds: float) -> None:
        """Wait, but not longer than the errand goes on."""
        self._over.wait(seconds)

    def fails(self, sent_s: float) -> None:
        """A request failed for the first time; `ends` must follow."""
        with self._lock:
            self._failing += 1
            if self._failing == 1:
                self._tell_failing(sent_s)

    def ends(self) -> None:
        """A request that failed before has its answer."""
        with self._lock:
            self._failing -= 1
            if not self._failing:
                self._tell_eased()

    def cleanup_left_s(self) -> float:
        """How long one may still try to take back what was begun: all of it together gets a minute."""
        with self._lock:
            if self._cleanup_end_s is None:
                self._cleanup_end_s = self._clock() + _CLEANUP_S
            return max(0.0, self._cleanup_end_s - self._clock())


def within(seconds: float, *, clock: Callable[[], float] = time.monotonic) -> Errand:
    """An errand that is given up after so many seconds."""
    end_s = clock() + seconds
    return Errand(is_late=lambda: clock() >= end_s, clock=clock)
