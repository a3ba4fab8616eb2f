"""The service process as its trainer holds it: started, hung up on, killed, left alone."""

import contextlib
import json
import logging
import os
import socket
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import asyncckpt
from asyncckpt.engine.arena import has_memory_files
from asyncckpt.engine.cores import usable_cores
from asyncckpt.engine.job import rules_to_json
from asyncckpt.engine.wire import Channel, Message, pair
from asyncckpt.options import EngineName, KeepRule, S3Options

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
    `silent_s`: likewise a service with saves in flight; it speaks nine times as often.
    """

    url: str
    s3: S3Options | None
    workers: int
    keep: tuple[KeepRule, ...] = ()
    nice: int = 19
    hang_s: float = 60.0
    starved_s: float = 15.0
    silent_s: float = 90.0


class ServiceProcess:
    """One service and the channel to it. It outlives this process until what it was given is done."""

    def __init__(self, options: EngineOptions) -> None:
        ours, theirs = pair()
        self._stderr = os.memfd_create("asyncckpt-stderr", os.MFD_CLOEXEC)
        try:
            self._process = _popen(theirs, self._stderr)
            self.channel = Channel(ours)
            with contextlib.suppress(ConnectionError):  # dead already: the listener reads that
                self.send_fd(_hello(options), os.pidfd_open(os.getpid()))
        except BaseException:
            ours.close()  # and so it ends, if it was started
            os.close(self._stderr)
            if hasattr(self, "_process"):
                self._process.wait(_GRACE_S)
            raise
        finally:
            theirs.close()

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
        self._let_go()

    def _let_go(self) -> None:
        self.channel.sock.close()  # not Channel.close(): a lock of it may be held for ever in a forked child
        stderr, self._stderr = self._stderr, -1
        if stderr >= 0:
            os.close(stderr)


def _popen(sock: socket.socket, stderr: int) -> "subprocess.Popen[bytes]":
    path = [str(Path(entry).absolute()) for entry in sys.path]
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
    if engine is not None:
        return engine
    if has_memory_files() and sys.executable:
        return "service"
    _LOG.warning(
        "no memory files or no interpreter to start: saving on threads of this process, slower beside a busy main thread"
    )
    return "inline"
