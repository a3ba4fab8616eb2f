"""A signal handler at every moment of a call: `python -m tests.moments` sweeps over all of them, each in a forked process.

A handler runs at the entry of a function or behind a call in C, so those are the moments. Each is one number, which finds it again.
"""

import argparse
import contextlib
import faulthandler
import itertools
import os
import random
import shutil
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from asyncckpt import Run, Saver, errors, load
from asyncckpt.state.hook import gate
from tests.processes import PATIENCE_S, children, descriptors, eventually
from tests.training import Training

PREEMPTION = 10**6
_EVENTS = frozenset({"call", "c_return"})


class Stop(BaseException):
    """What a handler raises."""


def at_moment(number: int, handler: Callable[[], None], act: Callable[[], Any]) -> int:
    """Run `act`, and `handler` at this moment of it; how many moments there were before the end, or the handler."""
    count = 0

    def profile(frame: Any, event: str, arg: Any) -> None:
        nonlocal count
        if event in _EVENTS and frame.f_code is not at_moment.__code__:
            count += 1
            if count == number:
                sys.setprofile(None)
                handler()

    sys.setprofile(profile)
    try:
        act()
    finally:
        sys.setprofile(None)
    return count


class Life:
    """A run that has saved `before` times. `call` is what the handler comes in the middle of."""

    def __init__(self, url: str, call: str, *, overlap: bool, before: int, **options: Any) -> None:
        self.training = Training()
        self.training.step()
        self.saver = Saver(url, overlap=overlap, workers=1, **options)
        self.before = before
        for step in range(1, before + 1):
            self.saver.save(step, self.training.state).result(PATIENCE_S)
        self.act: Callable[[], Any] = getattr(self, call)

    def save(self) -> None:
        self.saver.save(self.before + 1, self.training.state)

    def step(self) -> None:
        self.saver.save(self.before + 1, self.training.state)
        self.training.optimizer.step()

    def wait(self) -> None:
        self.saver.save(self.before + 1, self.training.state)
        self.saver.wait()

    def result(self) -> None:
        self.saver.save(self.before + 1, self.training.state).result()

    def full(self) -> None:
        self.saver.save(self.before + 1, self.training.state)
        self.saver.save(self.before + 2, self.training.state)

    def close(self) -> None:
        self.saver.save(self.before + 1, self.training.state)
        self.saver.close()

    def prepare(self) -> None:
        self.saver.prepare(self.training.state)

    def restore(self) -> None:
        self.saver.restore(self.training.state)


def saves_and_exits(life: Life, number: int) -> str:
    """The usual handler on SLURM and on spot machines."""

    def handler() -> None:
        try:
            life.saver.save(PREEMPTION, life.training.state)
            life.saver.close()
        except errors.CheckpointError as error:
            tell(f"refused: {error}")  # at once: nothing hangs
            os._exit(0 if isinstance(error, errors.ReentrantCallError) or "is closed" in str(error) else 1)
        tell("saved")
        os._exit(0)

    at_moment(number, handler, life.act)
    return "over"


def saves_and_returns(life: Life, number: int) -> str:
    """And what it interrupted goes on."""

    def handler() -> None:
        with contextlib.suppress(errors.ReentrantCallError):
            life.saver.save(PREEMPTION, life.training.state).result(PATIENCE_S)
            met.append("saved")

    met: list[str] = []
    try:
        at_moment(number, handler, life.act)
    except errors.CheckpointError as error:
        if "closed" not in str(error):
            raise
    if not life.saver._turns.closed:
        life.saver.save(PREEMPTION + 1, life.training.state).result(PATIENCE_S)
    return _closed(life, met)


def closes_and_returns(life: Life, number: int) -> str:
    """A close() within a call leaves nothing once that call is over."""

    def handler() -> None:
        with contextlib.suppress(errors.ReentrantCallError):
            life.saver.save(PREEMPTION, life.training.state)
            met.append("saved")
        life.saver.close()

    met: list[str] = []
    try:
        at_moment(number, handler, life.act)
    except errors.CheckpointError as error:
        if "closed" not in str(error):
            raise
    return _closed(life, met)


def raises(life: Life, number: int) -> str:
    """Ctrl-C. The next save works, and nothing is left at the end."""

    def handler() -> None:
        raise Stop

    try:
        at_moment(number, handler, life.act)
    except Stop:
        pass
    except RuntimeError as error:  # Python's own, where an interrupt comes in the middle of Thread.start()
        if not isinstance(error.__context__, Stop):
            raise
    torch.set_grad_enabled(True)
    met: list[str] = []
    if not life.saver._turns.closed:
        life.saver.wait_staged(PATIENCE_S)
        life.saver.save(PREEMPTION, life.training.state).result(PATIENCE_S)
        life.training.optimizer.step()
        eventually(lambda: not life.saver._ledger.in_flight, "every save has its answer", 5)
        eventually(lambda: not life.saver._launcher._arenas.in_flight, "no arena is lost", 5)
        assert not gate.in_flight()
        met = ["saved"]
    return _closed(life, met)


HANDLERS = {act.__name__: act for act in (saves_and_exits, saves_and_returns, closes_and_returns, raises)}
_out = 1


def tell(line: str) -> None:
    os.write(_out, f"{line}\n".encode())


def _closed(life: Life, met: list[str]) -> str:
    life.saver.close()
    with contextlib.suppress(errors.CheckpointError):
        life.saver.save(0, {})
    eventually(lambda: not children(os.getpid()), "no process is left", 5)
    eventually(lambda: len(_begun()) == 1, f"no thread is left: {_begun()}", 5)
    left = [target for target in descriptors().values() if "memfd" in target or "socket" in target]
    assert not left, left
    return met[0] if met else "over"


def _begun() -> list[threading.Thread]:
    """Threads that run. An interrupt in the middle of Python's own `Thread.start()` leaves one that never does."""
    return [thread for thread in threading.enumerate() if thread._started.is_set()]


def meet(handler: str, call: str, number: int, folder: str, log: int, **options: Any) -> None:
    """In a forked process: one moment. Its end is told to `log`."""
    global _out  # noqa: PLW0603
    _out = log
    faulthandler.dump_traceback_later(PATIENCE_S / 2, exit=True, file=log)
    try:
        life = Life(folder, call, **options)
        if handler == "count":
            tell(f"moments {at_moment(0, lambda: None, life.act)}")
            life.saver.close()
        else:
            tell(HANDLERS[handler](life, number))
        os._exit(0)
    except BaseException:
        os.write(log, traceback.format_exc().encode())
        os._exit(1)


def forked(handler: str, call: str, number: int, **options: Any) -> tuple[int, str, list[int]]:
    """The status, what was told, and the steps that stand there and can be read."""
    folder = tempfile.mkdtemp(prefix="asyncckpt-moments-")
    try:
        with tempfile.TemporaryFile() as log:
            pid = os.fork()
            if pid == 0:
                meet(handler, call, number, folder, log.fileno(), **options)
            status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            log.seek(0)
            told = log.read().decode()
        steps = [checkpoint.step for checkpoint in Run(folder).checkpoints()]
        for step in steps:
            load(folder, step=step)
        return status, told, steps
    finally:  # a service may still finish the save that was interrupted
        eventually(lambda: shutil.rmtree(folder, ignore_errors=True) or not Path(folder).exists(), f"{folder} is gone")


def fault(handler: str, call: str, number: int, **options: Any) -> str:
    """What is wrong at this moment; nothing if all is well."""
    status, told, steps = forked(handler, call, number, **options)
    if status != 0:
        return f"status {status}: {told}"
    if "saved" in told and PREEMPTION not in steps:
        return f"the preemption checkpoint is lost, {steps}: {told}"
    return ""


CALLS = ("save", "step", "wait", "result", "full", "close", "prepare", "restore")
_REACHED = {0: 4000, 2: 900}
"""So many moments a call has at most, by the saves before it: the first starts the engine."""


def sample(count: int, seed: int, engines: list[str]) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """Moments drawn from all of them."""
    draw = random.Random(seed)
    for _ in range(count):
        before = draw.choice((0, 2, 2))
        options = {"before": before, "engine": draw.choice(engines), "overlap": draw.random() < 0.5}
        yield draw.choice(list(HANDLERS)), draw.choice(CALLS), draw.randint(1, _REACHED[before]), options


def sweep(asked: argparse.Namespace) -> Iterator[tuple[str, str, int, dict[str, Any]]]:
    """All moments of what was asked for."""
    for call, before, engine, overlap in itertools.product(asked.call, asked.before, asked.engine, asked.overlap):
        options = {"before": before, "engine": engine, "overlap": bool(overlap)}
        moments = int(forked("count", call, 0, **options)[1].split()[-1])
        print(f"{moments} moments of {call}() with {options}", flush=True)
        for handler in asked.handler:
            for number in range(asked.first, moments + 1, asked.every):
                yield handler, call, number, options


def main() -> int:
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser()
    parser.add_argument("--handler", nargs="*", default=list(HANDLERS))
    parser.add_argument("--call", nargs="*", default=CALLS)
    parser.add_argument("--before", nargs="*", type=int, default=list(_REACHED))
    parser.add_argument("--engine", nargs="*", default=["service", "inline"])
    parser.add_argument("--overlap", nargs="*", type=int, default=[1, 0])
    parser.add_argument("--first", type=int, default=1)
    parser.add_argument("--every", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--sample", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder, Saver(folder, engine="inline") as saver:
        saver.save(1, Training().step().state)  # imports what torch imports late
    ends_s = time.monotonic() + asked.seconds
    found: Counter[str] = Counter()
    for handler, call, number, options in (
        sample(asked.sample, asked.seed, asked.engine) if asked.sample else sweep(asked)
    ):
        if time.monotonic() > ends_s:
            break
        wrong = fault(handler, call, number, **options)
        found["wrong" if wrong else "fine"] += 1
        if wrong:
            print(f"{handler} at moment {number} of {call}() with {options}: {wrong}", flush=True)
    print(dict(found), flush=True)
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
