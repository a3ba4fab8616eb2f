"""How many bodies go over the wire at once, as the answers to them allow."""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_GROWS_AFTER = 10  # bodies
_HALVED_EVERY_S = 5.0  # what was under way at the same time fails together, and is one reason
_PART_S = 30.0  # what a dead connection may cost, and how long a store is silent about a good one
_MEASURED = 16  # bodies


class Pace:
    """Turns to send (or receive) a body: half as many after a refusal or a dead connection, one more after ten that went well.

    Each process has its own and sees only its own bodies. So several of them share a link as TCP's connections do: by what each meets.

    Args:
        most: Turns at once, at the beginning and at the end.
        clock: Monotonic seconds.
    """

    def __init__(self, most: int, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._most = most
        self._clock = clock
        self._changed = threading.Condition()
        self._under_way = 0
        self._went_well = 0  # since the last change
        self._halved_s = -_HALVED_EVERY_S
        self._measured: deque[tuple[int, float]] = deque(maxlen=_MEASURED)
        self.turns = most
        """How many there are now."""

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Wait for one."""
        with self._changed:
            while self._under_way >= self.turns:
                self._changed.wait()
            self._under_way += 1
        try:
            yield
        finally:
            with self._changed:
                self._under_way -= 1
                self._changed.notify()

    def went_well(self, body_bytes: int, took_s: float) -> None:
        """A body is acknowledged."""
        with self._changed:
            self._measured.append((body_bytes, took_s))
            self._went_well += 1
            if self._went_well >= _GROWS_AFTER and self.turns < self._most:
                self._went_well = 0
                self.turns += 1
                self._changed.notify()

    def slow_down(self) -> None:
        """The store asked for it, or a connection died. To be said in its turn."""
        with self._changed:
            now_s = self._clock()
            if now_s - self._halved_s >= _HALVED_EVERY_S:
                self._halved_s, self._went_well = now_s, 0
                self.turns = max(1, min(self.turns, self._under_way) // 2)

    def part_bytes(self, *, least_bytes: int, most_bytes: int) -> int:
        """What one connection carries in half a minute, as far as that is known."""
        with self._changed:
            took_s = sum(seconds for _, seconds in self._measured)
            if not took_s:
                return max(least_bytes, most_bytes)
            carried_bytes = int(_PART_S * sum(count for count, _ in self._measured) / took_s)
        return max(least_bytes, min(most_bytes, carried_bytes))
