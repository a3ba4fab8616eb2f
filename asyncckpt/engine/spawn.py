"""The service process as its trainer holds it: started, hung up on, killed, left alone."""

import contextlib
import functools
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import asyncckpt
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.job import rules_to_json
from asyncckpt.engine.notices import notices_folder
from asyncckpt.engine.wire import REFUSED, Channel, Message, memory_file, memory_files_refused, pair
from asyncckpt.errors import CheckpointError
from asyncckpt.options import EngineName, KeepRule, RetryPolicy, S3Options

_BOOTSTRAP = """\
import sys, json, importlib.util
sys.path += json.loads(sys.argv[2])
spec = importlib.util.spec_from_file_location("asyncckpt", sys.argv[3])
sys.modules["asyncckpt"] = package = importlib.util.module_from_spec(spec)
spec.loader.exec_module(package)
from asyncckpt.engine.service import main
main(int(sys.argv[1]))
"""
# `-P` and appending keep a queue.py in the user's folder from shadowing the standard library's; the package itself is
# loaded from the very file the trainer uses, wherever that was found.
_STDERR_BYTES = 4096
_MAX_WORKERS = 8
_LOG = logging.getLogger("asyncckpt")
_GRACE_S = 2.0
SIGNS = 9
"""Signs of life that a service gives within the time after which its silence is taken for death."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs to know of its Saver.

    `nice`: how far workers yield to the trainer: at 10 a main loop keeps 0.83 of a core that it shares with a worker (an
    encoder and an upload at once), at 15 0.94, at 19 0.97. `hang_s`: a busy worker that gives no sign of life for this long
    is replaced; `starved_s`: one that does little but wait for a core so long is followed by one that yields less.
    `silent_s`: likewise a service with saves in flight; it speaks nine times as often. `notices`: the folder for what a service that
    outlived its trainer tells the next Saver. `least_alone_s`: it may last so long alone, also where nothing is tried again: a store that
    is well needs some time for a shard.
    """

    url: str
    s3: S3Options | None
    workers: int
    keep: tuple[KeepRule, ...] = ()
    nice: int = 19
    hang_s: float = 60.0
    starved_s: float = 15.0
    silent_s: float = 90.0
    notices: Path = field(default_factory=notices_folder)
    least_alone_s: float = 5.0

    @property
    def alone_s(self) -> float:
        """How long a service without a trainer may last while no save moves."""
        return max(self.least_alone_s, (self.s3.retry if self.s3 else RetryPolicy()).deadline_s)

    @property
    def place(self) -> str:
        """What a later Saver of the same checkpoints calls them, too."""
        endpoint = self.s3.endpoint_url if self.s3 else None
        return f"{self.url} at {endpoint}" if endpoint else self.url


class ServiceProcess:
    """One service and the channel to it. It outlives this process until what it was given is done."""

    def __init__(self, options: EngineOptions) -> None:
        with contextlib.ExitStack() as undo:
            self._stderr = memory_file("asyncckpt-stderr", b"")
            undo.callback(os.close, self._stderr)
            pidfd = _pidfd()
            undo.callback(_close, pidfd)
            ours, theirs = pair()
            undo.callback(ours.close)
            with theirs:
                self._process = _popen(theirs, self._stderr)
            undo.pop_all()
        self.channel = Channel(ours)
        try:
            with contextlib.suppress(ConnectionError):  # dead already: the listener reads that
                self.channel.send(_hello(options), pidfd)
        except BaseException:  # no descriptor is free
            self.kill()
            self.bury()
            raise
        finally:
            _close(pidfd)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    def send_fd(self, message: Message, fd: int) -> None:
        """Send a message with one descriptor, and close that."""
        try:
            self.channel.send(message, [fd])
        finally:
            os.close(fd)

    def kill(self) -> None:
        """The listener sees the end of the stream."""
        self._process.kill()

    def hang_up(self) -> None:
        """No more saves will come; it finishes those it has, and ends."""
        with contextlib.suppress(OSError):
            self.channel.sock.shutdown(socket.SHUT_WR)

    def bury(self) -> str:
        """Kill it if need be, free everything, and tell how it ended."""
        try:
            status = self._process.wait(_GRACE_S)  # it may be about to end by itself, and then its status says more
        except subprocess.TimeoutExpired:
            self.kill()
            status = self._process.wait()
        text = os.pread(self._stderr, 2**20, 0)[-_STDERR_BYTES:].decode(errors="replace").strip()
        self._let_go()
        return f"exit status {status}" + (f": {text}" if text else "")

    def part(self, wait_s: float) -> None:
        """Free everything; it may go on alone after `wait_s` seconds."""
        try:
            self._process.wait(wait_s)
        except subprocess.TimeoutExpired:
            self._process.returncode = 0  # on purpose: no ResourceWarning
            with contextlib.suppress(RuntimeError):  # at the interpreter's end, where init takes the service over
                threading.Thread(target=os.waitpid, args=(self.pid, 0), name="asyncckpt-reaper", daemon=True).start()
        self._let_go()

    def leave_in_child(self) -> None:
        """In a forked child: let go of the descriptors, touch nothing else."""
        self._process.returncode = 0  # the parent's child, not ours
        self.channel.leave_in_child()
        self._close_stderr()

    def _let_go(self) -> None:
        self.channel.close()
        self._close_stderr()

    def _close_stderr(self) -> None:
        stderr, self._stderr = self._stderr, -1
        if stderr >= 0:
            os.close(stderr)


def _popen(sock: socket.socket, stderr: int) -> "subprocess.Popen[bytes]":
    path = []
    for entry in sys.path:
        with contextlib.suppress(FileNotFoundError):  # relative, and the working directory was deleted
            path.append(str(Path(entry).absolute()))
    command = [sys.executable, "-P", "-c", _BOOTSTRAP, str(sock.fileno()), json.dumps(path), str(asyncckpt.__file__)]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=stderr,
        pass_fds=[sock.fileno()],
        process_group=0,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
    )


def _pidfd() -> list[int]:
    """A descriptor by which the service sees our end; none where the kernel refuses it."""
    if not Path("/proc/self").exists():
        say_once("no /proc: one shard at a time is encoded, since nothing says which cores are idle")
    try:
        return [os.pidfd_open(os.getpid())]
    except OSError as error:
        if error.errno not in REFUSED:
            raise
        say_once(f"pidfd_open: {error.strerror}: the checkpoint service looks every second whether this process lives")
        return []


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


@functools.cache
def say_once(what: str) -> None:
    """Warn, once a process, of what this host refuses."""
    _LOG.warning("%s", what)


def _hello(options: EngineOptions) -> dict[str, Any]:
    return {
        "url": options.url,
        "s3": options.s3.to_json() if options.s3 else None,
        "workers": options.workers,
        "keep": rules_to_json(options.keep),
        "nice": options.nice,
        "hang_s": options.hang_s,
        "starved_s": options.starved_s,
        "alive_s": options.silent_s / SIGNS,
        "trainer": os.getpid(),
        "alone_s": options.alone_s,
        "notices": str(options.notices),
        "place": options.place,
    }


def default_workers() -> int:
    """The usable cores, divided among the ranks of this host, at most 8 and at least 1."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_MAX_WORKERS, usable_cores() // max(1, ranks)))


def choose_engine(url: str, engine: EngineName | None, *, in_process: bool) -> EngineName:
    """The user's engine, or the service where it can run. `in_process`: the store is an object of this process."""
    if in_process or url.startswith("memory:"):
        if engine == "service":
            raise ValueError("a store that lives in this process needs the in-process engine: leave engine out")
        return "inline"
    reason = memory_files_refused() or ("" if sys.executable else "there is no Python interpreter to start")
    if engine == "service" and reason:
        raise CheckpointError(f'engine="service" cannot run on this host: {reason}; leave engine out')
    if engine is None and reason:
        say_in_process(reason)
    return engine or ("inline" if reason else "service")


def say_in_process(reason: str) -> None:
    """Warn of what it means that there is no service."""
    say_once(f"{reason}: saving on threads of this process, which is slower beside a busy main thread and ends with it")
