"""How far snapshots have come that are still being taken, so that what is complete of them is stored already.

The trainer's copy writes into the arena how many shards it has filled (`Arena.counter_offset`), between the tensors and without the GIL. A
message for each shard would cost a busy trainer 5 ms of waiting for the GIL.
"""

import time
from collections.abc import Sequence

from asyncckpt.engine.arena import read_counter
from asyncckpt.engine.schedule import Schedule

_POLL_S = 0.001
_SLOW_POLL_S = 0.05  # where nothing moves, or no core is idle: each look takes the time of one that is busy
_LONG_S = 2.0  # without progress: the trainer was stopped, or waits for memory


class Copying:
    """The saves whose snapshots are not complete, by number."""

    def __init__(self) -> None:
        self._arenas: dict[int, tuple[int, int]] = {}
        self._moved_s = 0.0
        self._backed_off = False

    @property
    def numbers(self) -> Sequence[int]:
        """All of them."""
        return tuple(self._arenas)

    @property
    def poll_s(self) -> float:
        """When to look again."""
        if not self._arenas:
            return float("inf")
        stands = time.monotonic() - self._moved_s >= _LONG_S
        return _SLOW_POLL_S if self._backed_off or stands else _POLL_S

    def add(self, number: int, fd: int, size_bytes: int) -> None:
        """A snapshot has begun in this arena."""
        self._arenas[number] = (fd, size_bytes)
        self._moved_s = time.monotonic()

    def discard(self, number: int) -> None:
        """It is complete, or never will be."""
        self._arenas.pop(number, None)

    def back_off(self) -> None:
        """No core is idle at this moment."""
        self._backed_off = True

    def look(self, schedule: Schedule) -> None:
        """Tell the schedule what may be stored by now."""
        self._backed_off = False
        for number, (fd, size_bytes) in self._arenas.items():
            if schedule.filled(number, read_counter(fd, size_bytes)):
                self._moved_s = time.monotonic()
