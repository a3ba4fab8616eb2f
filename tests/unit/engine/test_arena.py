"""Arenas: memory files and the pool that lends them."""

import contextlib
import errno
import gc
import mmap
import os
import threading
from pathlib import Path

import pytest

from asyncckpt.engine.arena import Arena, ArenaPool, why_none

PAGE = mmap.PAGESIZE


def open_descriptors():
    return len(os.listdir("/proc/self/fd"))


def close_all(pool):
    for arena in pool.all():
        arena.close()


def test_an_arena_is_the_memory_that_its_descriptor_names():
    arena = Arena.create(1, 3 * PAGE)
    with mmap.mmap(arena.fd, 3 * PAGE) as other:
        arena.buffer[PAGE : PAGE + 5] = b"bytes"
        assert other[PAGE : PAGE + 5] == b"bytes"
    arena.close()


def test_touching_keeps_the_contents_and_makes_the_pages_exist():
    arena = Arena.create(1, 64 * PAGE)
    arena.buffer[:5] = b"bytes"
    arena.touch()
    assert arena.buffer[:5] == b"bytes"
    assert os.fstat(arena.fd).st_blocks * 512 >= 64 * PAGE
    arena.close()


def test_close_frees_descriptor_and_map_and_may_be_said_twice():
    before = open_descriptors()
    arena = Arena.create(1, PAGE)
    arena.close()
    arena.close()
    assert open_descriptors() == before
    assert arena.buffer.closed


def held_arenas():
    """Descriptors of arenas that this process holds."""
    found = 0
    for fd in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found += "asyncckpt-arena" in os.readlink(f"/proc/self/fd/{fd}")
    return found


def test_a_forked_child_holds_neither_the_map_nor_a_descriptor():
    """Else a DataLoader worker would keep the memory of an arena that was closed long ago."""
    arena = Arena.create(1, PAGE)
    line = f"{arena.address:x}-"
    assert line in Path("/proc/self/maps").read_text()
    assert held_arenas() == 1
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            arena.leave_in_child()
            arena.leave_in_child()  # a fork of the fork says it again
            status = 2 * (line in Path("/proc/self/maps").read_text()) + 4 * (held_arenas() != 0)
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    arena.close()


def test_a_pool_reuses_an_arena_that_is_large_enough():
    pool = ArenaPool(1, shared=True)
    arena, replaced = pool.take(10 * PAGE)
    assert replaced == []
    pool.give_back(arena)
    again, replaced = pool.take(5 * PAGE)
    assert again is arena
    assert replaced == []
    close_all(pool)


def test_a_pool_takes_the_smallest_that_fits():
    pool = ArenaPool(2, shared=True)
    large, _ = pool.take(10 * PAGE)
    small, _ = pool.take(2 * PAGE)
    pool.give_back(large)
    pool.give_back(small)
    assert pool.take(PAGE)[0] is small
    assert pool.take(PAGE)[0] is large
    close_all(pool)


def test_an_arena_that_became_too_small_is_handed_out_to_be_closed():
    pool = ArenaPool(1, shared=True)
    small, _ = pool.take(PAGE)
    pool.give_back(small)
    large, replaced = pool.take(2 * PAGE)
    assert replaced == [small]
    assert large.bytes >= 2 * PAGE
    assert pool.all() == [large]
    close_all(pool)
    small.close()


def test_there_are_never_more_arenas_than_agreed():
    pool = ArenaPool(2, shared=True)
    first, second = (pool.take(PAGE)[0] for _ in range(2))
    assert pool.take(PAGE) is None
    assert not pool.wait_free(0.01)
    assert pool.in_flight == 2
    pool.give_back(first)
    assert pool.in_flight == 1
    assert pool.take(PAGE)[0] is first
    assert {arena.number for arena in pool.all()} == {first.number, second.number}
    close_all(pool)


def test_a_waiting_take_gets_the_arena_that_comes_back():
    pool = ArenaPool(1, shared=True)
    arena, _ = pool.take(PAGE)
    got = []
    thread = threading.Thread(target=lambda: got.append(pool.wait_free(30) and pool.take(PAGE)[0]))
    thread.start()
    pool.give_back(arena)
    thread.join(30)
    assert got == [arena]
    close_all(pool)


def test_a_state_that_memory_cannot_hold_leaves_the_pool_as_it_was():
    pool = ArenaPool(1, shared=True)
    small, _ = pool.take(PAGE)
    pool.give_back(small)
    before = open_descriptors()
    with pytest.raises((OSError, ValueError, OverflowError, MemoryError)):
        pool.take(2**62)
    assert open_descriptors() == before
    assert pool.take(PAGE)[0] is small
    close_all(pool)


def test_closing_stops_a_touch_in_progress():
    arena = Arena.create(1, 512 * 2**20)
    thread = threading.Thread(target=arena.touch)
    thread.start()
    arena.close()
    thread.join(30)
    assert not thread.is_alive()
    assert arena.buffer.closed


def test_an_arena_that_somebody_still_looks_into_closes_and_its_map_goes_with_the_view():
    before = open_descriptors()
    arena = Arena.create(1, PAGE)
    arena.buffer[:4] = b"seen"
    view = memoryview(arena.buffer)
    arena.close()
    assert open_descriptors() == before
    assert view[:4] == b"seen"
    view.release()
    arena.buffer.close()
    assert arena.buffer.closed


@pytest.mark.parametrize(
    ("number", "way_out"), [(errno.EFBIG, "ulimit -f"), (errno.EMFILE, "ulimit -n"), (errno.ENOMEM, "no memory")]
)
def test_why_there_is_no_arena_names_the_limit(number, way_out):
    assert way_out in why_none(1000, OSError(number, os.strerror(number)))


@pytest.mark.parametrize("shared", [True, False])
def test_a_forked_child_that_drops_an_arena_frees_nobody_elses_memory(shared):
    """The map is not in the child, so something else may stand at its addresses by then."""
    arenas = [Arena.create(number, 2**22, shared=shared) for number in range(4)]
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            others = [mmap.mmap(-1, arena.bytes) for arena in arenas]
            arenas.clear()
            gc.collect()
            for other in others:
                other[:] = b"x" * len(other)
            os._exit(0)
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    for arena in arenas:
        arena.close()
