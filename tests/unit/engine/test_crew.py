"""Which worker a task goes to when one starved and the host has no process left."""

import os
import selectors
import time
from typing import Any

import pytest

from asyncckpt.engine.job import SaveJob
from asyncckpt.engine.seat import Seat
from asyncckpt.engine.service import Service
from asyncckpt.engine.wire import Channel, pair


class CrewOnly(Service):
    """Its workers are seats without a process, and no further one can be forked."""

    def __init__(self) -> None:
        self.sockets = list(pair())
        self.sockets[0].setblocking(False)
        self.pidfd = os.pidfd_open(os.getpid())
        hello: dict[str, Any] = {
            "workers": 2,
            "keep": [],
            "nice": 19,
            "hang_s": 60.0,
            "starved_s": 15.0,
            "alive_s": 10.0,
        }
        super().__init__(Channel(self.sockets[0]), hello, self.pidfd)
        self.given: list[tuple[int, str]] = []

    def close(self) -> None:
        self._selector.close()
        os.close(self.pidfd)
        for sock in self.sockets:
            sock.close()

    def sit(self, nice: int) -> Seat:
        ours, theirs = pair()
        self.sockets += (ours, theirs)
        seat = Seat(1, Channel(ours), time.monotonic(), nice=nice)
        self._seats.append(seat)
        self._selector.register(seat.channel, selectors.EVENT_READ, seat)
        return seat

    def _hire(self) -> Seat:
        raise OSError("no process left")

    def _give(self, seat: Seat, task: Any) -> None:
        self.given.append((seat.nice, task.kind))
        seat.tasks[task.number] = task
        seat.encoding = seat.encoding or task.kind == "shard"

    def _dismiss(self, seat: Seat) -> None:
        self._seats.remove(seat)


@pytest.fixture
def service():
    service = CrewOnly()
    yield service
    service.close()


def test_a_starved_worker_that_cannot_be_followed_goes_on(service):
    old = service.sit(nice=19)
    service._nice = 10  # it starved
    service._schedule.submit(SaveJob(1, 1, "aaaaaaaa-000001", structure=1, arena=1, codec="zstd", time_s=0.0), 2)
    service._dispatch()
    service._watch()
    assert service._seats == [old]
    old.tasks.clear()
    old.encoding = False
    service._watch()
    service._dispatch()
    assert [nice for nice, kind in service.given if kind == "shard"] == [19, 19]
