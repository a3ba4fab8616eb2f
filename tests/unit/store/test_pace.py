"""How many bodies go over the wire at once, on a clock of its own."""

import random
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from asyncckpt.store.pace import Pace

MIB = 2**20


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@contextmanager
def under_way(pace: Pace, count: int) -> Iterator[None]:
    with ExitStack() as turns:
        for _ in range(count):
            turns.enter_context(pace.turn())
        yield


def test_a_refusal_halves_what_is_under_way(clock: Clock) -> None:
    pace = Pace(32, clock=clock)
    with under_way(pace, 16):
        pace.slow_down()
    assert pace.turns == 8


def test_refusals_that_come_together_halve_once(clock: Clock) -> None:
    pace = Pace(16, clock=clock)
    with under_way(pace, 16):
        for _ in range(16):
            pace.slow_down()
            clock.now_s += 0.3
        assert pace.turns == 8
        clock.now_s += 5.0
        pace.slow_down()
    assert pace.turns == 4


def test_one_always_has_its_turn(clock: Clock) -> None:
    pace = Pace(2, clock=clock)
    for _ in range(9):
        with pace.turn():
            pace.slow_down()
        clock.now_s += 6.0
    assert pace.turns == 1


def test_ten_that_went_well_add_one_up_to_where_it_began(clock: Clock) -> None:
    pace = Pace(3, clock=clock)
    with pace.turn():
        pace.slow_down()
    assert pace.turns == 1
    for count in range(1, 41):
        pace.went_well(MIB, 1.0)
        assert pace.turns == min(1 + count // 10, 3)


@pytest.mark.parametrize(("takes_s", "most_on_average"), [(1.0, 4), (0.4, 14), (0.01, 16)])
def test_a_store_that_refuses_three_of_ten_is_never_asked_more_at_once(
    clock: Clock, takes_s: float, most_on_average: float
) -> None:
    pace, chance = Pace(16, clock=clock), random.Random(7)
    seen = []
    for _ in range(min(int(300 / takes_s), 1500)):
        clock.now_s += takes_s
        with under_way(pace, pace.turns):
            for refused in [chance.random() < 0.3 for _ in range(pace.turns)]:
                pace.slow_down() if refused else pace.went_well(MIB, takes_s)
        seen.append(pace.turns)
    assert max(seen) <= 16
    assert sum(seen[len(seen) // 3 :]) / (len(seen) * 2 / 3) <= most_on_average


def test_who_waits_for_a_turn_gets_it_when_another_ends_or_fails() -> None:
    pace = Pace(1)
    began = threading.Event()

    def wait_for_it() -> None:
        with pace.turn():
            began.set()

    waiter = threading.Thread(target=wait_for_it)
    with pytest.raises(ValueError, match="its own"), pace.turn():
        waiter.start()
        assert not began.wait(0.05)
        raise ValueError("its own")
    assert began.wait(5.0)
    waiter.join()


def test_a_part_is_what_one_connection_carries_in_half_a_minute(clock: Clock) -> None:
    pace = Pace(16, clock=clock)
    sizes = {"least_bytes": 5 * MIB, "most_bytes": 16 * MIB}
    assert pace.part_bytes(**sizes) == 16 * MIB
    for _ in range(20):
        pace.went_well(4 * MIB, 16.0)
    assert pace.part_bytes(**sizes) == 7.5 * MIB
    for _ in range(20):
        pace.went_well(4 * MIB, 160.0)
    assert pace.part_bytes(**sizes) == 5 * MIB
    for _ in range(20):
        pace.went_well(4 * MIB, 0.1)
    assert pace.part_bytes(**sizes) == 16 * MIB
