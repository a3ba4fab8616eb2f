"""A warm process that has imported torch and forks trainers: 10 ms instead of seconds each, and no thread crosses.

`Warm` is the test's side. A forked trainer runs one function of `tests.trainers` as if it were a script: it ends the way
the interpreter ends.
"""

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from tests.processes import PATIENCE_S, eventually, kill


class Trainer:
    """A forked trainer. `lines`: what it reported; `status`: how it ended."""

    def __init__(self, warm: "Warm", pid: int) -> None:
        self.warm = warm
        self.pid = pid

    @property
    def lines(self) -> list[dict[str, Any]]:
        return list(self.warm.reports.get(self.pid, []))

    @property
    def status(self) -> int | None:
        """The exit code, or minus the signal; None while it runs."""
        return self.warm.statuses.get(self.pid)

    def report(self, key: str, patience_s: float = PATIENCE_S) -> Any:
        """What it reported under `key`, once it has."""

        def look() -> list[Any]:
            found = [line[key] for line in self.lines if key in line]
            assert found or self.status is None, f"the trainer ended ({self.status}) without {key}: {self.lines}"
            return found

        return eventually(look, f"trainer {self.pid} reports {key}", patience_s)[0]

    def end(self, patience_s: float = PATIENCE_S) -> int:
        """Its status, once it has ended."""
        eventually(lambda: self.status is not None, f"trainer {self.pid} ends; it reported {self.lines}", patience_s)
        assert self.status is not None
        return self.status

    def kill(self, number: int = signal.SIGKILL) -> None:
        kill(self.pid, number)


class Warm:
    """The warm process, from the test's side."""

    def __init__(self) -> None:
        self.reports: dict[int, list[dict[str, Any]]] = {}
        self.statuses: dict[int, int] = {}
        self._started: list[int] = []
        root = str(Path(__file__).parents[1])
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from tests.warm import serve; serve()"],
            cwd=root,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()
        eventually(lambda: 0 in self.reports, "the warm process is ready", 120)

    def start(self, function: str, *args: Any) -> Trainer:
        """Fork a trainer that runs `tests.trainers.<function>(*args)`."""
        known = set(self._started)
        assert self._process.stdin
        self._process.stdin.write(json.dumps([function, args]) + "\n")
        self._process.stdin.flush()
        (pid,) = eventually(lambda: set(self._started) - known, f"{function} is forked")
        return Trainer(self, pid)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._process.stdin
        assert self._process.stdout
        for pid in self._started:
            if pid not in self.statuses:
                kill(pid)
        self._process.stdin.close()
        self._process.wait(PATIENCE_S)
        self._thread.join(PATIENCE_S)
        self._process.stdout.close()

    def _listen(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            message = json.loads(line)
            pid = message.pop("pid")
            if "status" in message:
                self.statuses[pid] = message["status"]
            elif "forked" in message:
                self._started.append(message["forked"])
            else:
                self.reports.setdefault(pid, []).append(message)


def tell(**facts: Any) -> None:
    """Report to the test, from a trainer. One atomic write."""
    os.write(1, (json.dumps({"pid": os.getpid(), **facts}) + "\n").encode())


def serve() -> None:
    """The warm process itself: never more than one thread, so every fork is clean."""
    import torch

    torch.set_num_threads(1)
    from tests import trainers
    from tests.training import Training

    Training().step()  # imports what torch imports late

    wake, write = os.pipe()
    os.set_blocking(write, False)
    signal.set_wakeup_fd(write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    os.write(1, b'{"pid":0}\n')
    for function, args in _requests(wake):
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for fd in (0, wake, write):
                os.close(fd)
            os.open(os.devnull, os.O_RDONLY)
            getattr(trainers, function)(*args)
            return  # and so the interpreter ends as after a script
        tell(forked=pid)


def _requests(wake: int) -> Iterator[list[Any]]:
    buffer = b""
    while True:
        readable, _, _ = select.select([0, wake], [], [])
        if wake in readable:
            os.read(wake, 1000)
            _reap()
        if 0 in readable:
            data = os.read(0, 65536)
            if not data:
                return
            buffer += data
            while b"\n" in buffer:
                line, _, buffer = buffer.partition(b"\n")
                yield json.loads(line)


def _reap() -> None:
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            os.write(1, (json.dumps({"pid": pid, "status": os.waitstatus_to_exitcode(status)}) + "\n").encode())
