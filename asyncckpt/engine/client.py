"""The trainer's side of the service: start it, hand saves over, hear their answers, start another when it dies."""

import contextlib
import json
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import asyncckpt
from asyncckpt import errors, events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import CommitOutcome, SaveJob, rules_to_json
from asyncckpt.engine.wire import Channel, memory_file, pair
from asyncckpt.format.plan import Plan, Structure
from asyncckpt.options import KeepRule, S3Options

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
_MAX_DEATHS = 3
_SIGNS = 9  # of life within the time after which silence is death
_STDERR_BYTES = 4096
_LOG = logging.getLogger("asyncckpt")


class Listener(Protocol):
    """Hears what became of the saves, on the engine's thread."""

    def ended(self, number: int, outcome: CommitOutcome | None, error: BaseException | None) -> None:
        """A save has its answer."""

    def event(self, event: events.Event) -> None:
        """Something worth knowing happened."""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What an engine needs to know of its Saver.

    `nice`: how far workers yield to the trainer. `hang_s`: a busy worker that gives no sign of life for this long is replaced.
    `silent_s`: likewise a service with saves in flight; it speaks nine times as often.
    """

    url: str
    s3: S3Options | None
    workers: int
    keep: tuple[KeepRule, ...] = ()
    nice: int = 10
    hang_s: float = 60.0
    silent_s: float = 90.0


@dataclass(slots=True)
class _Submitted:
    job: SaveJob
    shards: int
    structure: Structure
    arena: Arena
    state: bytes


class ServiceEngine:
    """Saves through a service process. All methods are thread-safe."""

    def __init__(self, options: EngineOptions, listener: Listener, next_attempt: Callable[[], str]) -> None:
        self._options = options
        self._listener = listener
        self._next_attempt = next_attempt
        self._lock = threading.RLock()
        self._submitted: dict[int, _Submitted] = {}
        self._told_structures: set[int] = set()
        self._told_arenas: set[int] = set()
        self._deaths = 0
        self._closing = False
        self._broken: str | None = None
        self._heard_s = time.monotonic()
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr = -1
        self._channel: Channel | None = None
        self._start()
        self._thread = threading.Thread(target=self._listen, name="asyncckpt-listener", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The service's process id."""
        return self._process.pid if self._process else None

    def submit(self, job: SaveJob, plan: Plan, arena: Arena, state: bytes) -> None:
        """Hand one staged save over. It goes on if this process is killed."""
        save = _Submitted(job, len(plan.shards), plan.structure, arena, state)
        with self._lock:
            if self._broken is not None:
                raise errors.WorkerDiedError(self._broken)
            self._submitted[job.number] = save
            self._heard_s = time.monotonic()
            try:
                self._send(save)
            except ConnectionError:
                _LOG.debug("the service is gone; the listener starts another and submits again")
            except Exception:
                del self._submitted[job.number]
                raise
            except (
                BaseException
            ):  # Ctrl-C may have cut a message: the listener starts another service and submits again
                self._kill()
                raise

    def holds(self, number: int) -> bool:
        """Whether this save was handed over and has no answer yet."""
        return number in self._submitted

    def forget_arena(self, arena: Arena) -> None:
        """The arena will be unmapped."""
        self._forget("arena", arena.number, self._told_arenas)

    def forget_structure(self, number: int) -> None:
        """No later job names this structure."""
        self._forget("structure", number, self._told_structures)

    def close(self, *, wait: bool = True) -> None:
        """End the service. Saves that were handed over are finished first, also when this does not `wait` for them."""
        with self._lock:
            self._closing = True
            self._heard_s = time.monotonic()
            self._hang_up()
        self._thread.join()
        if self._process is not None:
            try:
                self._process.wait(self._options.silent_s if wait else 0)
            except subprocess.TimeoutExpired:
                _leave(self._process)
        self._let_go()

    def close_in_child(self) -> None:
        """In a forked child: let go of the descriptors, touch nothing else."""
        if self._process is not None:
            self._process.returncode = 0  # the parent's child, not ours
        self._let_go()

    def _hang_up(self) -> None:
        if self._channel is not None:
            with contextlib.suppress(OSError):
                self._channel.sock.shutdown(socket.SHUT_WR)

    def _kill(self) -> None:
        if self._process is not None:
            self._process.kill()

    def _let_go(self) -> None:
        if self._channel is not None:
            self._channel.sock.close()
        if self._stderr >= 0:
            os.close(self._stderr)
            self._stderr = -1

    # -- sending

    def _start(self) -> None:
        ours, theirs = pair()
        self._stderr = os.memfd_create("asyncckpt-stderr", os.MFD_CLOEXEC)
        path = [str(Path(entry).absolute()) for entry in sys.path]
        options = self._options
        try:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-P",
                    "-c",
                    _BOOTSTRAP,
                    str(theirs.fileno()),
                    json.dumps(path),
                    str(asyncckpt.__file__),
                ],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._stderr,
                pass_fds=[theirs.fileno()],
                process_group=0,
                env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
            )
        except BaseException:
            ours.close()
            os.close(self._stderr)
            self._stderr = -1
            raise
        finally:
            theirs.close()
        self._channel = Channel(ours)
        self._told_structures.clear()
        self._told_arenas.clear()
        self._heard_s = time.monotonic()
        hello: dict[str, Any] = {
            "url": options.url,
            "s3": options.s3.to_json() if options.s3 else None,
            "workers": options.workers,
        }
        hello |= {
            "keep": rules_to_json(options.keep),
            "nice": options.nice,
            "hang_s": options.hang_s,
            "alive_s": options.silent_s / _SIGNS,
        }
        with contextlib.suppress(ConnectionError):
            self._send_fd(hello, os.pidfd_open(os.getpid()))

    def _send(self, save: _Submitted) -> None:
        assert self._channel is not None
        job = save.job
        if job.structure not in self._told_structures:
            fd = memory_file("asyncckpt-structure", json.dumps(save.structure.to_json()).encode())
            self._send_fd({"op": "structure", "structure": job.structure}, fd)
            self._told_structures.add(job.structure)
        if job.arena not in self._told_arenas:
            assert save.arena.fd is not None
            self._channel.send({"op": "arena", "arena": job.arena, "bytes": save.arena.bytes}, [save.arena.fd])
            self._told_arenas.add(job.arena)
        fd = memory_file("asyncckpt-state", save.state)
        self._send_fd({"op": "save", "job": job.to_json(), "shards": save.shards}, fd)

    def _send_fd(self, message: dict[str, Any], fd: int) -> None:
        assert self._channel is not None
        try:
            self._channel.send(message, [fd])
        finally:
            os.close(fd)

    def _forget(self, kind: str, number: int, told: set[int]) -> None:
        with self._lock:
            if number in told and self._channel is not None:
                told.discard(number)
                with contextlib.suppress(OSError):
                    self._channel.send({"op": f"forget_{kind}", kind: number})

    # -- listening

    def _listen(self) -> None:
        try:
            while self._hear():
                pass
        except Exception as error:  # noqa: BLE001 - nobody would answer any more: tell everybody who waits
            _LOG.debug("the listener of the checkpoint service failed", exc_info=error)
            with self._lock:
                self._kill()
                self._broken = f"the checkpoint service is lost: {type(error).__name__}: {error}"
            self._fail_all()

    def _hear(self) -> bool:
        """Wait for messages and pass them on. False at the end."""
        channel = self._channel
        assert channel is not None
        waiting = select.poll()  # unlike select, it takes descriptors above 1023
        waiting.register(channel, select.POLLIN)
        if not waiting.poll(self._options.silent_s / _SIGNS * 1000):
            self._judge_silence()
            return True
        messages = channel.receive()
        if messages is None:
            return self._restart()
        self._heard_s = time.monotonic()
        for message, _ in messages:
            self._heard(message)
        return True

    def _judge_silence(self) -> None:
        with self._lock:
            if (self._submitted or self._closing) and time.monotonic() - self._heard_s > self._options.silent_s:
                self._kill()

    def _heard(self, message: dict[str, Any]) -> None:
        kind = message["op"]
        if kind == "ended":
            self._deaths = 0
            with self._lock:
                self._submitted.pop(message["job"], None)
            outcome = CommitOutcome.from_json(message["outcome"]) if "outcome" in message else None
            error = errors.from_json(message["error"]) if "error" in message else None
            self._listener.ended(message["job"], outcome, error)
        elif kind == "stored":
            self._listener.event(events.ShardStored(**message["data"]))
        elif kind == "retried":
            self._listener.event(events.StoreRetried(**message["data"]))
        elif kind == "worker_replaced":
            self._listener.event(events.WorkerReplaced(message["reason"]))
        elif kind == "removed":
            self._listener.event(events.CheckpointsRemoved(tuple(message["steps"])))

    def _restart(self) -> bool:
        """The service is gone: start another and submit again what had no answer. False if that was the end."""
        assert self._process is not None
        assert self._channel is not None
        with self._lock:
            if self._closing and (not self._submitted or self._process.poll() in (None, 0)):
                return False  # it heard that we go, and finishes alone
            self._kill()
            status = self._process.wait()
            self._deaths += 1
            reason = self._last_words(status)
            self._channel.close()
            if self._deaths < _MAX_DEATHS:
                self._start()
                self._submit_again()
                count = len(self._submitted)
            else:
                self._broken = f"the checkpoint service died {self._deaths} times: {reason}"
                count = -1
        if count < 0:
            self._fail_all()
            return False
        _LOG.warning("the checkpoint service died (%s); another was started, %d save(s) submitted again", reason, count)
        self._listener.event(events.ServiceRestarted(count))
        return True

    def _submit_again(self) -> None:
        for save in self._submitted.values():
            earlier = (*save.job.earlier_attempts, save.job.attempt)
            save.job = replace(save.job, attempt=self._next_attempt(), earlier_attempts=earlier)
            with contextlib.suppress(ConnectionError):
                self._send(save)
        if self._closing:
            self._hang_up()

    def _fail_all(self) -> None:
        with self._lock:
            failed, self._submitted = self._submitted, {}
        for number in failed:
            self._listener.ended(number, None, errors.WorkerDiedError(self._broken or "the checkpoint service is lost"))

    def _last_words(self, status: int) -> str:
        text = os.pread(self._stderr, 2**20, 0)[-_STDERR_BYTES:].decode(errors="replace").strip()
        os.close(self._stderr)
        self._stderr = -1
        return f"exit status {status}" + (f": {text}" if text else "")


def _leave(process: "subprocess.Popen[bytes]") -> None:
    """It goes on without us, on purpose: no ResourceWarning, and no zombie once it ends."""
    process.returncode = 0
    with contextlib.suppress(RuntimeError):  # the interpreter ends, and so will init have the service
        threading.Thread(target=os.waitpid, args=(process.pid, 0), name="asyncckpt-reaper", daemon=True).start()
