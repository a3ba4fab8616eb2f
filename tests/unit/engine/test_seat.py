"""When one more worker may encode."""

import subprocess
import sys
import time

import pytest

from asyncckpt.engine.cores import runnable_threads
from asyncckpt.engine.seat import Seat, room_for_one_more
from asyncckpt.engine.wire import Channel, pair
from tests.processes import PATIENCE_S


@pytest.mark.parametrize(
    ("strangers", "own", "encoders", "cores", "room"),
    [
        (0, 1, 1, 2, True),  # beside an idle trainer
        (0, 9, 1, 2, True),  # whose worker's eight uploads want to run too
        (1, 1, 1, 2, False),  # beside one busy thread
        (1, 9, 1, 2, False),
        (1, 3, 2, 4, True),
        (2, 3, 2, 4, False),
        (40, 0, 1, 2, False),
    ],
)
def test_strangers_and_encoders_share_the_cores_and_own_uploads_do_not_count(strangers, own, encoders, cores, room):
    assert room_for_one_more(1 + strangers + own, own, encoders, cores) is room


@pytest.mark.parametrize(("program", "wanted"), [("input()", 0), ("while True: pass", 1)])
def test_a_worker_that_waits_wants_no_core_and_one_that_computes_wants_one(program, wanted):
    ours, theirs = pair()
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE) as process, ours, theirs:
        seat = Seat(process.pid, Channel(ours), time.monotonic())
        deadline_s = time.monotonic() + PATIENCE_S
        seen = 0
        while seen < 20:  # in a row: while it starts it computes, and while it computes it may wait for a page
            seen = seen + 1 if seat.runnable_threads() == wanted else 0
            assert time.monotonic() < deadline_s
        assert runnable_threads() >= 1
        process.kill()
        process.wait()
        assert seat.runnable_threads() == 0  # it is gone
