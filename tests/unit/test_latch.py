"""A latch goes on whenever a signal handler comes, and whatever it does."""

import threading

import pytest

from asyncckpt.latch import Latch
from tests.moments import Stop, at_moment
from tests.processes import PATIENCE_S


def test_whoever_waits_goes_on_once_it_is_set():
    latch = Latch()
    assert not latch.wait(0.01)
    waiting = [threading.Thread(target=latch.wait) for _ in range(3)]
    for thread in waiting:
        thread.start()
    latch.set()
    latch.set()
    for thread in waiting:
        thread.join(PATIENCE_S)
    assert latch.is_set()
    assert latch.wait(0)
    assert latch.wait()


def test_a_handler_in_the_middle_of_a_wait_may_wait_and_set():
    for number in range(1, 10):
        latch = Latch()
        latch_set_first = Latch()
        latch_set_first.set()
        at_moment(
            number, lambda latch=latch: (latch.set(), latch.wait(PATIENCE_S)), lambda latch=latch: latch.wait(0.01)
        )
        at_moment(number, latch_set_first.wait, latch_set_first.wait)
        assert latch_set_first.wait(0)


@pytest.mark.parametrize("number", range(1, 10))
def test_an_interrupt_in_the_middle_of_a_wait_holds_nobody_up(number):
    latch = Latch()
    thread = threading.Thread(target=latch.wait)

    def interrupt():
        latch.set()
        raise Stop

    thread.start()
    try:
        at_moment(number, interrupt, lambda: latch.wait(0.01))
    except Stop:
        assert latch.wait(0)
    latch.set()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
