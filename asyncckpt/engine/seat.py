"""Workers as the service sees them: forked, introduced to structures and arenas, given tasks, dismissed."""

import contextlib
import os
import selectors
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from asyncckpt.engine.cores import runnable_threads, runnable_threads_of
from asyncckpt.engine.schedule import Task
from asyncckpt.engine.wire import Channel, Message, pair
from asyncckpt.engine.worker import run_worker
from asyncckpt.options import KeepRule

STARVED_SHARE = 0.8
STARVED_NICE = 15
"""Of workers that follow one that starved: a thirtieth of a core that is busy otherwise, and twice what nice 19 gets. At 10 a training loop
on all cores kept half of its speed, for each of its threads waits for the slowest."""


@dataclass(slots=True, eq=False)
class Seat:
    """`encoding`: a shard was given and is not encoded yet; `heard_s`: its last sign of life.

    Nothing here ever waits or raises for a worker that is gone: the end of its stream is read soon.
    """

    pid: int
    channel: Channel
    heard_s: float
    nice: int = 0
    encoding: bool = False
    worked: bool = False  # since it was last told to rest
    since_s: float = 0.0  # how long it has worked, as `starves` looks at it
    waited_s: float = 0.0  # for a core, in all, at that moment
    tasks: dict[int, Task] = field(default_factory=dict)
    known: set[tuple[str, int]] = field(default_factory=set)

    def give(self, task: Task, message: Message, fds: Sequence[int]) -> None:
        """Send a task."""
        if not self.tasks:
            self.heard_s = time.monotonic()
        self.tasks[task.number] = task
        self.encoding = self.encoding or task.kind == "shard"
        if not self.worked:
            self.worked, self.since_s, self.waited_s = True, time.monotonic(), self._waited_s()
        self._post(message, fds)

    def introduce(self, kind: str, number: int, fd: int, facts: Mapping[str, Any]) -> None:
        """Send a structure or an arena, once."""
        if (kind, number) not in self.known:
            self.known.add((kind, number))
            self._post({"op": kind, kind: number, **facts}, [fd])

    def forget(self, message: Message) -> None:
        """Mirror of `introduce`, with the trainer's own message."""
        kind = message["op"].removeprefix("forget_")
        if (kind, message[kind]) in self.known:
            self.known.discard((kind, message[kind]))
            self._post(message, [])

    def rest(self) -> None:
        """Nothing is in flight: memory that was kept for the next frame goes back."""
        if self.worked:
            self.worked = False
            self._post({"op": "rest"}, [])

    def runnable_threads(self) -> int:
        """How many of the worker's threads run or want to."""
        with contextlib.suppress(OSError):
            return runnable_threads_of(self.pid)
        return 0

    def starves(self, now_s: float, after_s: float) -> bool:
        """Whether its encoder has done little but wait for a core in the last `after_s` seconds of work.

        On a machine whose cores are all busy, nice 19 leaves it 1 part in 70: a save of 1 GB took 53 s instead of 2, and a
        training loop that waits for its arena would stand still.
        """
        elapsed_s = now_s - self.since_s
        if not self.encoding or elapsed_s < after_s:
            return False
        before_s, self.waited_s, self.since_s = self.waited_s, self._waited_s(), now_s
        return self.waited_s - before_s > STARVED_SHARE * elapsed_s

    def _waited_s(self) -> float:
        with contextlib.suppress(OSError, IndexError):  # it ended, or this kernel does not count
            return int(Path(f"/proc/{self.pid}/schedstat").read_bytes().split()[1]) / 1e9
        return 0.0

    def flush(self) -> None:
        """Send what did not fit before."""
        with contextlib.suppress(ConnectionError):
            self.channel.flush()

    def _post(self, message: Message, fds: Sequence[int]) -> None:
        with contextlib.suppress(ConnectionError):
            self.channel.post(message, fds)


class Seats:
    """All workers of a service, watched by its selector. Never waits for one that ends."""

    def __init__(self, selector: selectors.BaseSelector, hello: Mapping[str, Any], rules: Sequence[KeepRule]) -> None:
        self._selector = selector
        self._hello = hello
        self._rules = rules
        self._seats: list[Seat] = []
        self._dying: set[int] = set()

    def __iter__(self) -> Iterator[Seat]:
        return iter(tuple(self._seats))  # some may be dismissed on the way

    def __len__(self) -> int:
        return len(self._seats)

    def __contains__(self, seat: object) -> bool:
        return seat in self._seats

    @property
    def dying(self) -> bool:
        """Whether one that was dismissed has not ended yet."""
        return bool(self._dying)

    def hire(self, nice: int) -> Seat:
        """One more. `OSError` at the limit of processes."""
        seat = hire({**self._hello, "nice": nice}, self._rules)
        self._seats.append(seat)
        self._selector.register(seat.channel, selectors.EVENT_READ, seat)
        return seat

    def watch(self, seat: Seat) -> None:
        """Wait for room in its socket if something is left to send."""
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if seat.channel.pending else 0)
        self._selector.modify(seat.channel, mask, seat)

    def each(self, act: Callable[[Seat], None]) -> None:
        """Tell every worker something."""
        for seat in self:
            act(seat)
            self.watch(seat)

    def dismiss(self, seat: Seat) -> None:
        """Dead, hung or idle: nothing it holds is needed."""
        self._selector.unregister(seat.channel)
        seat.channel.close()
        self._seats.remove(seat)
        os.kill(seat.pid, signal.SIGKILL)
        self._dying.add(seat.pid)
        self.reap()

    def reap(self) -> None:
        """Bury those that ended: one that hangs in the kernel (a dead network filesystem) ends when that lets it go."""
        for pid in list(self._dying):
            if os.waitpid(pid, os.WNOHANG) != (0, 0):
                self._dying.discard(pid)


def room_for_one_more(runnable: int, own: int, encoders: int, cores: int) -> bool:
    """Whether strangers leave a core to one more encoder.

    `runnable`: threads of this host, the asking one included; `own`: those of our workers. Their uploads are no strangers:
    counted as such they would keep the second encoder waiting for ever.
    """
    return runnable - 1 - own + encoders < cores


def may_encode_more(seats: Collection[Seat]) -> bool:
    """Whether those who are not ours leave a core to one more encoder, at this moment; no where the kernel does not say."""
    encoders = sum(seat.encoding for seat in seats)
    cores = os.cpu_count() or 1
    try:
        runnable = runnable_threads()
    except (OSError, ValueError, IndexError):
        return False
    if room_for_one_more(runnable, 0, encoders, cores):  # whoever they are: spares a look at every upload thread
        return True
    return room_for_one_more(runnable, sum(seat.runnable_threads() for seat in seats), encoders, cores)


def hire(hello: dict[str, Any], rules: Sequence[KeepRule]) -> Seat:
    """Fork a worker. The caller has no threads."""
    ours, theirs = pair()
    service_pid = os.getpid()
    try:
        pid = os.fork()
    except OSError:
        ours.close()
        theirs.close()
        raise
    if pid == 0:
        status = 1
        try:
            ours.detach()
            run_worker(theirs, hello, rules, service_pid)
            status = 0
        except BaseException:  # noqa: BLE001 - a worker ends here, whatever happened
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    theirs.close()
    ours.setblocking(False)
    return Seat(pid, Channel(ours), time.monotonic(), nice=hello["nice"])
