"""What forked trainers do (see `tests.warm`). Each is a script with the store's URL as its first argument."""

import logging
import multiprocessing
import os
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from asyncckpt import KeepLast, RetryPolicy, S3Options, Saver, errors
from asyncckpt.engine.spawn import EngineOptions
from asyncckpt.events import SaveCommitted
from tests.processes import PATIENCE_S, descendants
from tests.refusals import hide_proc, refuse
from tests.training import Training, fingerprint, numbered
from tests.warm import tell

FAST = RetryPolicy(deadline_s=60.0, first_wait_s=0.02, max_wait_s=0.1, first_contact_s=0.5)


class TunedSaver(Saver):
    """A Saver whose engine loses its patience sooner."""

    def __init__(self, url: Any, *, engine_options: dict[str, Any] | None = None, **options: Any) -> None:
        self._tuning = engine_options or {}
        super().__init__(url, **options)

    def _engine_options(self) -> EngineOptions:
        return replace(super()._engine_options(), **self._tuning)


def s3(endpoint: str | None) -> S3Options | None:
    return S3Options(endpoint_url=endpoint, retry=FAST) if endpoint else None


def _saver(url: str, endpoint: str | None, **options: Any) -> Saver:
    return Saver(url, store=s3(endpoint), **options)


def _tell_service(saver: Saver) -> None:
    tell(service=saver._launcher._engine.pid)


def wait_for_ever() -> None:
    while True:
        signal.pause()


def save_with_patience(url: str, endpoint: str, deadline_s: float, engine_options: dict[str, Any]) -> None:
    """Hands step 1 over and lives on; its service has less patience."""
    options = {**engine_options, "notices": Path(engine_options["notices"])}
    policy = replace(FAST, deadline_s=deadline_s)
    store = S3Options(endpoint_url=endpoint, retry=policy)
    saver = TunedSaver(url, store=store, engine_options=options)
    saver.save(1, numbered(1))
    _tell_service(saver)
    tell(saved=1)
    wait_for_ever()


def save_and_wait(url: str, endpoint: str | None) -> None:
    """Hands step 1 over and lives on."""
    saver = _saver(url, endpoint)
    saver.save(1, numbered(1))
    _tell_service(saver)
    tell(saved=1)
    wait_for_ever()


def save_and_die(url: str, endpoint: str | None) -> None:
    """Is killed the moment that `save()` returns; the service is not even up."""
    saver = _saver(url, endpoint)
    saver.save(1, numbered(1))
    _tell_service(saver)
    os.kill(os.getpid(), signal.SIGKILL)


class Numbers(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 10**6

    def __getitem__(self, index: int) -> int:
        return index


def save_with_loader_workers(url: str, endpoint: str | None) -> None:
    """Loader workers are forked before and after the save, so they may hold whatever a fork inherits."""
    saver = _saver(url, endpoint)
    early = iter(DataLoader(Numbers(), num_workers=1, prefetch_factor=2))
    next(early)
    saver.save(1, numbered(1))
    late = iter(DataLoader(Numbers(), num_workers=1, prefetch_factor=2))
    next(late)
    _tell_service(saver)
    tell(loaders=[child.pid for child in multiprocessing.active_children()])
    tell(saved=1)
    wait_for_ever()


def exit_normally(url: str, endpoint: str | None) -> None:
    saver = _saver(url, endpoint)
    training = Training().step()
    saver.save(1, {**training.state, **numbered(1)})  # overlapped: staged only later
    _tell_service(saver)


def exit_after_dropping(url: str, endpoint: str | None) -> None:
    """Nobody holds the Saver any more when the script ends."""

    def cell() -> None:
        saver = _saver(url, endpoint)
        saver.save(1, numbered(1))
        _tell_service(saver)

    cell()


def drop_in_process(url: str) -> None:
    """The same with threads of this process, which end with it."""
    Saver(url, engine="inline").save(1, numbered(1))


def save_where_refused(url: str, what: str, code: int, options: dict[str, Any]) -> None:
    """Saves, restores, resumes in a process in which the kernel refuses a system call, or has no /proc; tells what was logged."""
    lines = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("asyncckpt").addHandler(handler)
    _refuse(what, code)
    engines = []
    for step in (1, 3):
        with Saver(url, **options) as saver:
            saver.restore({**numbered(0)}) if step > 1 else None
            for save in (saver.save(step, numbered(step)), saver.save(step + 1, numbered(step + 1))):
                save.result(PATIENCE_S)
            engines.append(type(saver._launcher._engine).__name__)
    tell(engines=engines, lines=lines)


def save_with_loader_workers_where_refused(url: str, endpoint: str | None, what: str, code: int) -> None:
    _refuse(what, code)
    save_with_loader_workers(url, endpoint)


def _refuse(what: str, code: int) -> None:
    if what == "/proc":
        hide_proc()
    else:
        refuse(what, code)


def exit_by_sys_exit(url: str, endpoint: str | None) -> None:
    saver = _saver(url, endpoint)
    saver.save(1, numbered(1))
    _tell_service(saver)
    sys.exit(3)


def exit_by_exception(url: str, endpoint: str | None) -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    with _saver(url, endpoint) as saver:
        saver.save(1, numbered(1))
        _tell_service(saver)
        raise RuntimeError("the loss is NaN")


def exit_at_once(url: str, endpoint: str | None) -> None:
    saver = _saver(url, endpoint)
    saver.save(1, numbered(1))
    _tell_service(saver)
    os._exit(7)


def train_until_interrupted(url: str, endpoint: str | None) -> None:
    os.setpgid(0, 0)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with _saver(url, endpoint) as saver:
        saver.save(1, numbered(1))
        _tell_service(saver)
        tell(saved=1)
        wait_for_ever()


def fork_with_a_saver(url: str, endpoint: str | None) -> None:
    """Children use the Saver; the parent goes on."""
    with _saver(url, endpoint) as saver:
        saver.save(1, numbered(1))
        pid = os.fork()
        if pid == 0:
            _use_in_child(saver)
            return  # through the rest of the interpreter's exit, atexit and all
        tell(forked_status=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        process = multiprocessing.get_context("fork").Process(target=_use_in_child, args=(saver,))
        process.start()
        process.join(PATIENCE_S)
        tell(process_status=process.exitcode)
        saver.save(2, numbered(2))
        saver.wait(PATIENCE_S)
    tell(went_on=True)


def _use_in_child(saver: Saver) -> None:
    refused = 0
    calls = (
        lambda: saver.save(9, numbered(9)),
        saver.wait,
        saver.wait_staged,
        lambda: saver.restore({}),
        lambda: saver.prepare({}),
        saver.close,
    )
    for call in calls:
        try:
            call()
        except errors.ForkedSaverError:
            refused += 1
    held = [os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if _exists(fd)]
    if refused != len(calls) or any("asyncckpt" in target for target in held):
        os._exit(9)


def _exists(fd: str) -> bool:
    try:
        os.readlink(f"/proc/self/fd/{fd}")
    except OSError:
        return False
    return True


def fork_during_saves(url: str, endpoint: str | None) -> None:
    """Forks at many moments of saves, and grandchildren too."""
    with _saver(url, endpoint) as saver:
        training = Training().step()
        for step in range(1, 11):
            saver.save(step, training.state)
            pid = os.fork()
            if pid == 0:
                grandchild = os.fork()
                if grandchild == 0:
                    os._exit(0)
                os.waitpid(grandchild, 0)
                training.step()  # the hook must not wait for a copy that is the parent's
                os._exit(0)
            training.step()
            tell(child=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
        saver.wait(PATIENCE_S)
    tell(went_on=True)


def share_a_core(url: str) -> None:
    """A main loop that never waits, on one core with its service and worker: who got how many CPU seconds of it."""
    core = min(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {core})
    state = {"x": torch.randn(12_000_000)}
    with Saver(url, workers=1) as saver:
        saver.save(0, state).result()
        service = saver._launcher._engine.pid
        save = saver.save(1, state)
        before = time.thread_time(), _cpu_of_all_s(service)
        while not save.done():
            sum(range(2000))
        ours_s = time.thread_time() - before[0]
        theirs_s = _cpu_of_all_s(service) - before[1]
    tell(cpu_s=[ours_s, theirs_s])


def _cpu_of_all_s(service: int) -> float:
    tasks = (task for pid in (service, *descendants(service)) for task in Path(f"/proc/{pid}/task").iterdir())
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def train_for_ever(url: str, endpoint: str | None, noise_bytes: int) -> None:
    """Resumes, trains, saves every step; tells every step's fingerprint before it saves, and every commit."""

    def on_event(event: Any) -> None:
        if isinstance(event, SaveCommitted):
            tell(committed=event.report.step)

    training = Training()
    noise = torch.zeros(noise_bytes, dtype=torch.uint8)
    with _saver(url, endpoint, keep=[KeepLast(3)], hooks=[on_event]) as saver:
        restored = saver.restore({**training.state, "noise": noise})
        training.steps = restored.step if restored else 0
        tell(restored=training.steps, fingerprint=fingerprint([training.facts(), noise]))
        while True:
            training.step()
            noise.random_(generator=torch.Generator().manual_seed(training.steps))
            tell(step=training.steps, fingerprint=fingerprint([training.facts(), noise]))
            saver.save(training.steps, {**training.state, "noise": noise})
            _tell_service(saver)
