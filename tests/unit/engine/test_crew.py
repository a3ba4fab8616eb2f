"""Threads that share a list of items."""

import gc
import queue
import threading
import weakref

import pytest

from asyncckpt.engine.crew import Crew


def test_every_item_is_served_once_whatever_the_number_of_threads():
    for count in (1, 3, 50):
        served = queue.SimpleQueue()
        Crew(range(40), lambda put=served.put: put).run(count)
        served = [served.get() for _ in range(served.qsize())]
        assert sorted(served) == list(range(40))


def test_each_thread_has_a_worker_of_its_own():
    workers = []
    together = threading.Barrier(3, timeout=10)

    def worker():
        workers.append(threading.current_thread())
        together.wait()
        return lambda _: None

    Crew(range(100), worker).run(3)
    assert len(workers) == len(set(workers)) == 3


def test_the_first_error_is_raised_and_ends_the_others():
    served = []

    def serve(item):
        if item == 3:
            raise KeyError(item)
        served.append(item)

    crew = Crew(range(10_000), lambda: serve)
    with pytest.raises(KeyError):
        crew.run(2)
    assert crew.failed
    assert len(served) < 10_000
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("asyncckpt-fetch")]


def test_a_worker_that_cannot_be_made_is_an_error_too():
    def worker():
        raise MemoryError

    with pytest.raises(MemoryError):
        Crew([1], worker).run(2)


def test_progress_is_told_at_the_end():
    told = []
    Crew([1, 2], lambda: lambda _: None).run(1, lambda: told.append(None))
    assert told


def test_at_the_limit_of_threads_the_caller_works_alone(monkeypatch):
    def refuse(_):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    served = []
    Crew(range(5), lambda: served.append).run(2)
    assert served == list(range(5))


def test_an_error_keeps_nothing_alive():
    class Memory:
        pass

    def fail(memory):
        def serve(_):
            assert memory
            raise KeyError

        return serve

    memory = Memory()
    gone = weakref.ref(memory)
    gc.disable()
    try:
        with pytest.raises(KeyError) as caught:
            Crew([1], lambda memory=memory: fail(memory)).run(1)
        del caught, memory
        assert gone() is None
    finally:
        gc.enable()
