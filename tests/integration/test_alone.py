"""A service without its trainer or its Saver: it has a name, ends in time whatever hangs, and tells the next Saver how it ended."""

import contextlib
import logging
import os
import signal
import threading
import time

import pytest

import asyncckpt
from asyncckpt import Run, errors
from tests.processes import (
    PATIENCE_S,
    alive,
    children,
    command_of,
    descriptors,
    ended_at_last,
    eventually,
    kill,
)
from tests.trainers import TunedSaver, s3
from tests.training import assert_numbered, numbered


@pytest.fixture
def notices(tmp_path):
    return tmp_path / "notices"


@pytest.fixture
def told(s3_url, proxy, notices, caplog):
    """What the next Saver says when it is made."""

    def look():
        caplog.clear()
        with caplog.at_level(logging.INFO, "asyncckpt"):
            TunedSaver(s3_url, store=s3(proxy.url), engine_options={"notices": notices}).close()
        return [record.getMessage() for record in caplog.records if "left alone" in record.getMessage()]

    return look


def name_of(pid):
    """As `ps` shows it."""
    return command_of(pid).rstrip(b"\0").decode()


def named(pid, name):
    eventually(lambda: name_of(pid) == name, f"{pid} is called {name!r}, and not {name_of(pid)!r}")


@contextlib.contextmanager
def left_alone(warm, proxy, s3_url, notices, *, deadline_s=60.0, **options):
    """The pid of a service that has a save in flight, at a store that is down, and no trainer any more."""
    proxy.down = True
    engine_options = {"workers": 1, "notices": str(notices), **options}
    trainer = warm.start("save_with_patience", s3_url, proxy.url, deadline_s, engine_options)
    trainer.report("saved")
    service = trainer.report("service")
    with ended_at_last(service):
        eventually(lambda: children(service), "a worker works")
        trainer.kill()
        trainer.end()
        yield service


def test_the_name_of_a_service_says_whose_it_is_and_what_it_does(s3_url, proxy):
    with TunedSaver(s3_url, store=s3(proxy.url), workers=1) as saver:
        saver.save(1, numbered(1)).result(PATIENCE_S)
        service = saver._launcher._engine.pid
        (worker,) = children(service)
        named(service, "asyncckpt: run, idle")
        named(worker, "asyncckpt: run, worker")
        proxy.down = True
        save = saver.save(2, numbered(2))
        named(service, "asyncckpt: run, 1 save in flight")
        proxy.down = False
        save.result(PATIENCE_S)


def test_the_next_saver_is_told_what_is_on_its_way_and_then_that_it_is_stored(warm, proxy, s3_url, notices, told):
    with left_alone(warm, proxy, s3_url, notices) as service:
        named(service, "asyncckpt: run, 1 save in flight, left alone")
        (line,) = told()
        assert "step(s) 1 on their way; it goes on, and gives up after 60 s" in line
        proxy.down = False
        eventually(lambda: not alive(service), "it ends")
    (line,) = told()
    assert line.endswith("step(s) 1 stored")
    assert told() == []
    assert_numbered(asyncckpt.load(s3_url, step=1, store=s3(proxy.url)), 1)


def test_one_deadline_bounds_the_save_and_its_clean_up_and_the_next_saver_is_told(warm, proxy, s3_url, notices, told):
    with left_alone(warm, proxy, s3_url, notices, deadline_s=3.0, least_alone_s=0.0) as service:
        began_s = time.monotonic()
        worker = children(service)[0]
        eventually(lambda: not alive(service) and not alive(worker), "it ends")
        took_s = time.monotonic() - began_s
    assert took_s < 4.5, "the save alone takes one deadline, its clean-up would take another"
    proxy.down = False
    (line,) = told()
    assert "step(s) 1 given up" in line or "step 1 failed (DeadlineExceededError" in line
    with Run(s3_url, store=s3(proxy.url)) as run:
        assert list(run.checkpoints()) == []


def test_the_next_saver_is_told_of_a_service_that_was_killed(warm, proxy, s3_url, notices, told):
    with left_alone(warm, proxy, s3_url, notices) as service:
        named(service, "asyncckpt: run, 1 save in flight, left alone")
        kill(service)
        eventually(lambda: not alive(service), "it is gone")
    proxy.down = False
    (line,) = told()
    assert line.endswith("step(s) 1 not finished: the service was killed")


def test_a_service_whose_last_worker_hangs_ends(warm, proxy, s3_url, notices, told):
    """Not only the save: its removal hangs too, and nobody is there to send a message that would wake the service."""
    with left_alone(warm, proxy, s3_url, notices, hang_s=0.2, silent_s=3.0) as service:

        def hung():
            for worker in children(service):
                kill(worker, signal.SIGSTOP)
            return not alive(service)

        eventually(hung, "it ends though all its workers hang", 20)
    proxy.down = False
    (line,) = told()
    assert "step 1 failed (WorkerDiedError: 3 workers in a row died" in line


def test_savers_dropped_as_in_a_notebook_leave_no_process_descriptor_memory_or_thread(tmp_path):
    def cell(step):
        saver = TunedSaver(tmp_path, workers=1)
        saver.save(step, numbered(step)).result(PATIENCE_S)
        return saver._launcher._engine.pid

    cell(0)  # what is made once a process stays
    eventually(lambda: "asyncckpt-dropped" not in {thread.name for thread in threading.enumerate()}, "it has ended")
    before = descriptors(), threading.active_count(), children(os.getpid())
    services = [cell(step) for step in range(1, 4)]
    eventually(lambda: not any(map(alive, services)), "the services have ended")
    eventually(
        lambda: (descriptors(), threading.active_count(), children(os.getpid())) == before, "all is as it was before"
    )
    assert [checkpoint.step for checkpoint in Run(tmp_path).checkpoints()] == [0, 1, 2, 3]


def test_a_dropped_saver_answers_the_save_that_is_in_flight(s3_url, proxy):
    proxy.down = True
    saver = TunedSaver(s3_url, store=s3(proxy.url), workers=1)
    save = saver.save(1, numbered(1))
    service = saver._launcher._engine.pid
    del saver
    assert not save._ended.wait(0.3)
    assert alive(service)
    proxy.down = False
    assert save.result(PATIENCE_S).step == 1
    eventually(lambda: not alive(service), "its service ends")


def test_a_script_that_dropped_its_saver_ends_at_once_and_its_save_is_committed(warm, proxy, s3_url):
    proxy.down = True
    trainer = warm.start("exit_after_dropping", s3_url, proxy.url)
    service = trainer.report("service")
    with ended_at_last(service):
        assert trainer.end(patience_s=10) == 0, "it ends while the store is still down"
        assert alive(service)
        proxy.down = False
        eventually(lambda: not alive(service), "the service ends")
    assert_numbered(asyncckpt.load(s3_url, step=1, store=s3(proxy.url)), 1)


def test_a_script_that_dropped_a_saver_without_a_service_stores_first(warm, tmp_path):
    trainer = warm.start("drop_in_process", str(tmp_path))
    assert trainer.end() == 0
    assert_numbered(asyncckpt.load(tmp_path, step=1), 1)


def test_a_failed_save_of_a_dropped_saver_is_logged(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    saver = TunedSaver(tmp_path / "file" / "run", workers=1)
    with contextlib.suppress(errors.CheckpointError):
        saver.save(1, numbered(1))
    del saver
    eventually(lambda: "step 1: save failed" in caplog.text, "it is an ERROR in the log")


def test_services_killed_while_saves_are_handed_over_leave_no_memory_file(tmp_path):
    with TunedSaver(tmp_path, workers=1, codec="none") as saver:
        saver.save(0, numbered(0)).result(PATIENCE_S)
        before = descriptors()
        for step in range(1, 6):
            kill(saver._launcher._engine.pid)
            time.sleep(0.0004 * step)  # at different moments of the hand-over
            saver.save(step, numbered(step, 40_000 * step)).result(PATIENCE_S)
    left = [target for fd, target in descriptors().items() if "memfd" in target and fd not in before]
    assert left == []
