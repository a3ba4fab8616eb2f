"""The trainer's side of the service: start it, hand saves over, hear their answers, start another when it dies."""

import contextlib
import json
import logging
import math
import queue
import select
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from asyncckpt import errors, events
from asyncckpt.engine.arena import Arena
from asyncckpt.engine.job import CommitOutcome, SaveJob
from asyncckpt.engine.spawn import SIGNS, EngineOptions, ServiceProcess, say_once
from asyncckpt.engine.submitted import Listener, Submitted, parting_s
from asyncckpt.engine.upkeep import events_of
from asyncckpt.engine.wire import memory_file
from asyncckpt.format.plan import Plan
from asyncckpt.latch import Latch
from asyncckpt.options import RetryPolicy
from asyncckpt.store.away import meet
from asyncckpt.store.opening import address_of
from asyncckpt.telling import say

_MAX_DEATHS = 3
_LOG = logging.getLogger("asyncckpt")


class ServiceEngine:
    """Saves through a service process. All methods are thread-safe.

    The lock belongs to the threads of the engine and to the copy thread. A thread that signal handlers interrupt takes it only to `close`:
    the listener would wait for it until the handler returns, and the handler for the listener. Such a thread uses `call`.
    """

    def __init__(self, options: EngineOptions, listener: Listener, next_attempt: Callable[[], str]) -> None:
        self._options = options
        self._listener = listener
        self._next_attempt = next_attempt
        self._lock = threading.RLock()
        self._submitted: dict[int, Submitted] = {}
        self._told_structures: set[int] = set()
        self._told_arenas: set[int] = set()
        self._unsent: set[int] = set()  # announcements that nobody has sent yet
        self._orders: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._deaths = 0
        self._closing = False
        self._parted = False
        self._broken: str | None = None
        self._rested = Latch()  # nothing that was sent is under way any more, nor what follows the answers
        self._rested.set()
        self._store_fails = False  # a request was tried again since the last answer
        self._heard_s = time.monotonic()
        self._service: ServiceProcess  # from `start` on
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Before anything else. `close` must follow, whatever is raised."""
        self._service = ServiceProcess(self._options)
        for run, name in ((self._listen, "asyncckpt-listener"), (self._obey, "asyncckpt-announcer")):
            thread = threading.Thread(target=run, name=name, daemon=True)
            self._threads.append(thread)
            thread.start()

    @property
    def pid(self) -> int:
        """The service's process id."""
        return self._service.pid

    @property
    def broken(self) -> bool:
        """Whether it gave up: every save fails from now on."""
        return self._broken is not None

    def announce(self, job: SaveJob, plan: Plan, arena: Arena) -> None:
        """Say that this save's snapshot begins now: shards are stored as the arena's counter says that they are filled.

        Never waits, and is not sure to happen. `submit` or `withdraw` must follow; the save has its answer only then.
        """
        self._unsent.add(job.number)
        self._orders.put(lambda: self._announce(job, plan, arena))

    def call(self, act: Callable[[], None]) -> None:
        """Have it done on a thread where no signal handler comes, ahead of all that is asked for later; returns when it is done."""
        done = Latch()

        def acted() -> None:
            try:
                act()
            finally:
                done.set()

        self._orders.put(acted)
        done.wait()

    def submit(self, job: SaveJob, plan: Plan, arena: Arena, state: bytes) -> None:
        """Hand one staged save over. It goes on if this process is killed."""
        with self._lock:
            self._unsent.discard(job.number)
            save = self._submitted.get(job.number) or Submitted(job, len(plan.shards), plan.structure, arena)
            save.state = state
            if save.answer is None:
                self._submit(save)
        if save.answer is not None:
            self._answered(job.number, *save.answer)

    def withdraw(self, number: int, error: BaseException) -> None:
        """A snapshot that was announced failed: forget the save, remove what is stored of it, and let this error be its answer."""
        with self._lock:
            self._unsent.discard(number)
            save = self._submitted.get(number)
            if save is not None and save.answer is None:
                self._withdraw(save, error)
                return
            self._submitted.pop(number, None)
        self._listener.ended(number, None, error)

    def forget_arena(self, arena: Arena) -> None:
        """The arena will be unmapped."""
        self._forget("arena", arena.number, self._told_arenas)

    def forget_structure(self, number: int) -> None:
        """No later job names this structure."""
        self._forget("structure", number, self._told_structures)

    def close(self, *, wait_s: float = math.inf) -> None:
        """End the service. Saves that were handed over are finished first, also when this does not wait for them.

        What follows their answers (a removal, retention) is waited for as `parting_s` says, and `wait_s` at most: the service does it alone.
        """
        self._orders.put(None)
        _join(self._threads[1:])  # the announcer, which does all that it was asked for
        if not hasattr(self, "_service"):
            return  # an interrupt came before it was started
        with self._lock:
            self._closing = True
            self._heard_s = time.monotonic()
        retry = self._options.s3.retry if self._options.s3 else RetryPolicy()
        end_s = time.monotonic() + max(0.0, min(wait_s, parting_s(retry, store_fails=self._store_fails)))
        if not self._submitted:  # what retention has to tell is heard until then
            self._rested.wait(max(0.0, end_s - time.monotonic()))
        with self._lock:
            self._service.hang_up()
        _join(self._threads[:1])
        self._service.part(max(0.0, end_s - time.monotonic()))

    def close_in_child(self) -> None:
        """In a forked child: let go of the descriptors, no more."""
        if hasattr(self, "_service"):
            self._service.leave_in_child()

    # -- sending

    def _submit(self, save: Submitted) -> None:
        if self._broken is not None:
            raise errors.WorkerDiedError(self._broken)
        self._submitted[save.job.number] = save
        self._heard_s = time.monotonic()
        try:
            self._send(save)
        except ConnectionError:
            _LOG.debug("the service is gone; the listener starts another and submits again")
        except Exception as error:
            if not save.told:
                del self._submitted[save.job.number]
                raise
            self._withdraw(save, errors.CheckpointError(f"the save could not be handed over: {error!r}"))

    def _withdraw(self, save: Submitted, error: BaseException) -> None:
        save.withdrawn = error
        with contextlib.suppress(ConnectionError):  # the listener starts another, which will not hear of this save
            self._service.channel.send({"op": "withdraw", "save": save.job.number})

    def _send(self, save: Submitted) -> None:
        job, service = save.job, self._service
        self._rested = Latch()
        if job.structure not in self._told_structures:
            data = json.dumps(save.structure.to_json()).encode()
            fd = memory_file("asyncckpt-structure", data)
            service.send_fd({"op": "structure", "structure": job.structure}, fd)
            self._told_structures.add(job.structure)
        if job.arena not in self._told_arenas:
            assert save.arena.fd is not None
            service.channel.send({"op": "arena", "arena": job.arena, "bytes": save.arena.bytes}, [save.arena.fd])
            self._told_arenas.add(job.arena)
        message = {"op": "save", "job": job.to_json(), "shards": save.shards}
        if save.state is None:
            service.channel.send(message)
        else:
            fd = memory_file("asyncckpt-state", save.state)
            service.send_fd({"op": "staged", "save": job.number} if save.told else message, fd)
        save.told = True

    def _obey(self) -> None:
        """On a thread of its own: beside a busy main thread the copy thread would wait for the GIL after each system call."""
        for act in iter(self._orders.get, None):
            try:
                act()
            except Exception:  # noqa: BLE001 - the next order must be obeyed
                _LOG.exception("an order to the checkpoint service failed")

    def _announce(self, job: SaveJob, plan: Plan, arena: Arena) -> None:
        save = Submitted(job, len(plan.shards), plan.structure, arena)
        with self._lock:
            if job.number not in self._unsent or self._broken is not None:
                return  # its snapshot is complete already, or nobody would store it
            self._unsent.discard(job.number)
            self._submitted[job.number] = save
            try:
                self._send(save)
            except ConnectionError:
                _LOG.debug("the service is gone; the listener starts another and announces again")
            except OSError as error:  # no descriptor is free: `submit` tries again, and says so
                _LOG.debug("a snapshot could not be announced: %s", error)
                del self._submitted[job.number]

    def _forget(self, kind: str, number: int, told: set[int]) -> None:
        def forget() -> None:
            with self._lock:
                if number in told:
                    told.discard(number)
                    with contextlib.suppress(ConnectionError):
                        self._service.channel.send({"op": f"forget_{kind}", kind: number})

        self._orders.put(forget)

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
        finally:
            self._rested.set()

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
            waiting = self._closing or any(save.answer is None for save in self._submitted.values())
            if waiting and time.monotonic() - self._heard_s > self._options.silent_s:
                self._service.kill()

    def _heard(self, message: dict[str, Any]) -> None:
        kind = message["op"]
        if kind == "ended":
            self._deaths = 0
            self._store_fails = self._store_fails and "error" in message
            outcome = CommitOutcome.from_json(message["outcome"]) if "outcome" in message else None
            error = errors.from_json(message["error"]) if "error" in message else None
            self._answered(message["job"], outcome, error)
        elif kind == "stored":
            self._listener.event(events.ShardStored(**message["data"]))
        elif kind == "worker_replaced":
            self._listener.event(events.WorkerReplaced(message["reason"]))
        elif kind == "rested":
            self._rested.set()
        elif kind == "parted":  # it heard that we go, and finishes alone
            self._parted = True
        elif kind == "upkeep":
            for event in events_of(message["kind"], message["data"]):
                self._listener.event(event)
        elif kind == "refused":  # a worker's system call, by the kernel
            say_once(message["reason"])
        else:
            self._heard_of_store(kind, message)

    def _heard_of_store(self, kind: str, message: dict[str, Any]) -> None:
        if kind == "retried":
            self._store_fails = True
            self._listener.event(events.StoreRetried(**message["data"]))
        elif kind == "away":
            self._store_fails = True
            facts = {name: message[name] for name in events.StoreAway.__slots__}
            self._listener.event(events.StoreAway(**facts))
        elif kind == "back":
            self._listener.event(events.StoreBack(message["after_s"]))
        elif kind == "met":  # a service that follows this one must not take an outage for a wrong address
            meet(address_of(self._options.url, self._options.s3))

    def _answered(self, number: int, outcome: CommitOutcome | None, error: BaseException | None) -> None:
        with self._lock:
            save = self._submitted.get(number)
            if save is None:
                return
            if save.copying:  # the arena is being written: whoever waits for it must go on waiting
                save.answer = (outcome, error)
                return
            del self._submitted[number]
        if save.withdrawn is not None:
            outcome, error = None, save.withdrawn
        self._listener.ended(number, outcome, error)

    def _restart(self) -> bool:
        """The service is gone: start another and submit again what had no answer. False if that was the end."""
        with self._lock:
            if self._parted or (self._closing and not self._submitted):
                return False
            self._deaths += 1
            reason = self._service.bury()
            if self._deaths < _MAX_DEATHS:
                self._service = ServiceProcess(self._options)
                self._rested.set()
                self._submit_again()
                count = len(self._submitted)
            else:
                self._broken = f"the checkpoint service died {self._deaths} times: {reason}"
                count = -1
            withdrawn = [number for number, save in self._submitted.items() if save.withdrawn is not None]
        if count < 0:
            self._fail_all()
            return False
        for number in withdrawn:
            self._answered(number, None, None)  # the new service does not know them
        what = "the checkpoint service died (%s); another was started, %d save(s) submitted again"
        say(logging.WARNING, what, reason, count)
        self._listener.event(events.ServiceRestarted(count))
        return True

    def _submit_again(self) -> None:
        self._told_structures.clear()
        self._told_arenas.clear()
        self._heard_s = time.monotonic()
        for save in self._submitted.values():
            save.told = False
            if save.answer is not None or save.withdrawn is not None:
                continue
            earlier = (*save.job.earlier_attempts, save.job.attempt)
            save.job = replace(save.job, attempt=self._next_attempt(), earlier_attempts=earlier)
            with contextlib.suppress(ConnectionError):
                self._send(save)
        if self._closing:
            self._service.hang_up()

    def _fail_all(self) -> None:
        with self._lock:
            failed = list(self._submitted)
        for number in failed:
            self._answered(number, None, errors.WorkerDiedError(self._broken or "the checkpoint service is lost"))


def _join(threads: list[threading.Thread]) -> None:
    for thread in threads:
        with contextlib.suppress(RuntimeError):  # an interrupt came before it was started
            thread.join()
