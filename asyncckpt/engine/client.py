"""The trainer's side of the service: start it, hand saves over, hear their answers, start another when it dies."""

import contextlib
import json
import logging
import select
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from asyncckpt import errors, events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import CommitOutcome, SaveJob
from asyncckpt.engine.spawn import SIGNS, EngineOptions, ServiceProcess
from asyncckpt.engine.wire import memory_file
from asyncckpt.format.plan import Plan, Structure

_MAX_DEATHS = 3
_LOG = logging.getLogger("asyncckpt")


class Listener(Protocol):
    """Hears what became of the saves, on the engine's thread."""

    def ended(self, number: int, outcome: CommitOutcome | None, error: BaseException | None) -> None:
        """A save has its answer."""

    def event(self, event: events.Event) -> None:
        """Something worth knowing happened."""


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
        self._parted = False
        self._broken: str | None = None
        self._heard_s = time.monotonic()
        self._service = ServiceProcess(options)
        self._thread = threading.Thread(target=self._listen, name="asyncckpt-listener", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int:
        """The service's process id."""
        return self._service.pid

    @property
    def broken(self) -> bool:
        """Whether it gave up: every save fails from now on."""
        return self._broken is not None

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
            except BaseException:
                self._service.kill()  # Ctrl-C may have cut a message; the listener starts another and submits again
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
            self._service.hang_up()
        self._thread.join()
        self._service.part(self._options.silent_s if wait else 0)

    def close_in_child(self) -> None:
        """In a forked child: let go of the descriptors, touch nothing else."""
        self._service.leave_in_child()

    # -- sending

    def _send(self, save: _Submitted) -> None:
        job, service = save.job, self._service
        if job.structure not in self._told_structures:
            data = json.dumps(save.structure.to_json()).encode()
            fd = memory_file("asyncckpt-structure", data)
            service.send_fd({"op": "structure", "structure": job.structure}, fd)
            self._told_structures.add(job.structure)
        if job.arena not in self._told_arenas:
            assert save.arena.fd is not None
            service.channel.send({"op": "arena", "arena": job.arena, "bytes": save.arena.bytes}, [save.arena.fd])
            self._told_arenas.add(job.arena)
        fd = memory_file("asyncckpt-state", save.state)
        service.send_fd({"op": "save", "job": job.to_json(), "shards": save.shards}, fd)

    def _forget(self, kind: str, number: int, told: set[int]) -> None:
        with self._lock:
            if number in told:
                told.discard(number)
                with contextlib.suppress(ConnectionError):
                    self._service.channel.send({"op": f"forget_{kind}", kind: number})

    # -- listening

    def _listen(self) -> None:
        try:
            while self._hear():
                pass
        except Exception as error:  # noqa: BLE001 - nobody would answer any more: tell everybody who waits
            _LOG.debug("the listener of the checkpoint service failed", exc_info=error)
            with self._lock:
                self._service.kill()
                self._broken = f"the checkpoint service is lost: {type(error).__name__}: {error}"
            self._fail_all()

    def _hear(self) -> bool:
        """Wait for messages and pass them on. False at the end."""
        channel = self._service.channel
        waiting = select.poll()  # unlike select, it takes descriptors above 1023
        waiting.register(channel, select.POLLIN)
        if not waiting.poll(self._options.silent_s / SIGNS * 1000):
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
                self._service.kill()

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
        elif kind == "parted":  # it heard that we go, and finishes alone
            self._parted = True
        elif kind == "removed":
            self._listener.event(events.CheckpointsRemoved(tuple(message["steps"])))

    def _restart(self) -> bool:
        """The service is gone: start another and submit again what had no answer. False if that was the end."""
        with self._lock:
            if self._parted or (self._closing and not self._submitted):
                return False
            self._deaths += 1
            reason = self._service.bury()
            if self._deaths < _MAX_DEATHS:
                self._service = ServiceProcess(self._options)
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
        self._told_structures.clear()
        self._told_arenas.clear()
        self._heard_s = time.monotonic()
        for save in self._submitted.values():
            earlier = (*save.job.earlier_attempts, save.job.attempt)
            save.job = replace(save.job, attempt=self._next_attempt(), earlier_attempts=earlier)
            with contextlib.suppress(ConnectionError):
                self._send(save)
        if self._closing:
            self._service.hang_up()

    def _fail_all(self) -> None:
        with self._lock:
            failed, self._submitted = self._submitted, {}
        for number in failed:
            self._listener.ended(number, None, errors.WorkerDiedError(self._broken or "the checkpoint service is lost"))
