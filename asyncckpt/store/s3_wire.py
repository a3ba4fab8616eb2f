"""How bodies travel between `S3Store` and its store: in turns, and watched."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from asyncckpt.errors import StoreError
from asyncckpt.store.base import Progress
from asyncckpt.store.pace import Pace
from asyncckpt.store.s3_client import CONNECTIONS
from asyncckpt.store.s3_errors import slows_down
from asyncckpt.store.watch import Endurance, Watch


class S3Wire:
    """One store's traffic in one process: what it sends has its own pace, and what it receives."""

    def __init__(
        self, progress: Progress, endurance: Endurance, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.endurance = endurance
        self.watch = Watch(endurance, progress, clock=clock)
        self.sends = Pace(CONNECTIONS, clock=clock)
        self.receives = Pace(CONNECTIONS, clock=clock)
        self._clock = clock

    @contextmanager
    def body(self, pace: Pace, operation: str, body_bytes: int) -> Iterator[None]:
        """Wait for a turn, then send or receive one body; the pace learns how that went."""
        with pace.turn():
            began_s = self._clock()
            try:
                with self.watch.over(operation, body_bytes=body_bytes):
                    yield
            except StoreError as error:
                if slows_down(error):
                    pace.slow_down()
                raise
            pace.went_well(body_bytes, self._clock() - began_s)
