"""The service process: it owns the queue and the workers, and outlives its trainer.

No torch, no threads, no store request of its own: it only selects on sockets and pidfds, so a slow store never blocks
supervision and a worker may be forked at any moment. An idle service sleeps in `select`.
"""

import contextlib
import gc
import os
import selectors
import signal
import socket
import time
from pathlib import Path
from typing import Any

from asyncckpt import errors
from asyncckpt.engine import upkeep
from asyncckpt.engine.alone import Alone
from asyncckpt.engine.copying import Copying
from asyncckpt.engine.job import SaveJob, rules_from_json
from asyncckpt.engine.schedule import MAX_DEATHS, Ended, Schedule, Task
from asyncckpt.engine.seat import STARVED_NICE, Seat, Seats, may_encode_more
from asyncckpt.engine.title import Title, run_name, service_title
from asyncckpt.engine.wire import Channel

_REAP_S = 5.0  # what the service waits for killed workers at its own end
_LOOK_S = 1.0  # between two looks whether the trainer lives, where the kernel would not tell


class Service:
    """One trainer, one store, a few workers."""

    def __init__(self, trainer: Channel, hello: dict[str, Any], pidfd: int | None) -> None:
        self._trainer: Channel | None = trainer
        self._alone: Alone | None = None
        self._hello = hello
        self._rules = rules_from_json(hello["keep"])
        self._schedule = Schedule(retention=bool(self._rules), collection=True)
        self._selector = selectors.DefaultSelector()
        self._selector.register(trainer, selectors.EVENT_READ, "trainer")
        self._polls = pidfd is None
        if pidfd is not None:
            self._selector.register(pidfd, selectors.EVENT_READ, "pidfd")
        self._title = Title()
        self._name = run_name(hello["url"])
        self._seats = Seats(self._selector, hello, self._rules)
        self._copying = Copying()
        self._nice: int = hello["nice"]
        self._structures: dict[int, int] = {}
        self._arenas: dict[int, tuple[int, int]] = {}
        self._states: dict[int, int] = {}
        self._said_s = time.monotonic()
        self._said_rest = True

    def run(self) -> None:
        """Serve until the trainer is gone or has closed, and every save has its answer or its deadline is over."""
        self._tell({"op": "ready"})
        while self._goes_on():
            for key, mask in self._selector.select(self._timeout()):
                if key.data == "trainer":
                    self._trainer_ready(mask)
                elif key.data == "pidfd":
                    self._trainer_died()
                else:
                    self._seat_ready(key.data, mask)
        for seat in self._seats:
            self._seats.dismiss(seat)
        if self._alone is not None:
            self._alone.end(unfinished=not self._schedule.idle)
        deadline_s = time.monotonic() + _REAP_S
        while self._seats.dying and time.monotonic() < deadline_s:
            time.sleep(0.005)
            self._seats.reap()

    def _goes_on(self) -> bool:
        """Do what can be done without waiting; whether there is something to wait for."""
        self._copying.look(self._schedule)
        self._dispatch()  # first: saves may have come with the greeting
        self._watch()
        idle, alone = self._schedule.idle, self._alone is not None
        self._title.show(service_title(self._name, in_flight=len(self._unanswered), idle=idle, alone=alone))
        return self._alone is None or not (self._schedule.idle or self._alone.left_s == 0)

    def _timeout(self) -> float | None:
        alive_s = min(1.0, float(self._hello["alive_s"]))  # while saves are in flight the trainer hears that we live
        wait_s = min(alive_s, self._copying.poll_s)
        if self._alone is not None:
            return min(wait_s, self._alone.left_s)
        if self._schedule.idle and not self._seats.dying:
            return _LOOK_S if self._polls else None
        return wait_s

    @property
    def _unanswered(self) -> set[int]:
        """Saves that were handed over or announced, and have no answer yet."""
        return {*self._states, *self._copying.numbers}

    # -- the trainer

    def _trainer_ready(self, mask: int) -> None:
        if self._trainer is None:
            return
        if mask & selectors.EVENT_WRITE:
            self._tell(None)
        if self._trainer is not None and mask & selectors.EVENT_READ:
            self._read_trainer()

    def _read_trainer(self) -> bool:
        assert self._trainer is not None
        messages = self._trainer.receive()
        if messages is None:
            with contextlib.suppress(ConnectionError):
                self._trainer.post({"op": "parted"})
            self._drop_trainer()
            return False
        for message, fds in messages:
            getattr(self, "_on_" + message["op"])(message, fds)
        return bool(messages)

    def _trainer_died(self) -> None:
        # what it sent before it died is still in the socket, which a forked child may hold open
        while self._trainer is not None and self._read_trainer():
            pass
        self._drop_trainer()

    def _drop_trainer(self) -> None:
        for fileobj in [key.fileobj for key in self._selector.get_map().values() if key.data in ("trainer", "pidfd")]:
            self._selector.unregister(fileobj)
        if self._trainer is not None:
            self._trainer.close()
            self._trainer = None
            self._go_on_alone()
        for number in self._copying.numbers:
            self._on_withdraw({"save": number}, [])  # nobody completes its snapshot

    def _go_on_alone(self) -> None:
        runs = self._schedule.runs
        self._alone = Alone(
            Path(self._hello["notices"]),
            self._hello["place"],
            deadline_s=self._hello["alone_s"],
            steps=[runs[number].job.step for number in self._unanswered if number in runs],
        )

    def _on_structure(self, message: dict[str, Any], fds: list[int]) -> None:
        self._structures[message["structure"]] = fds[0]

    def _on_forget_structure(self, message: dict[str, Any], _: list[int]) -> None:
        os.close(self._structures.pop(message["structure"]))
        self._seats.each(lambda seat: seat.forget(message))

    def _on_arena(self, message: dict[str, Any], fds: list[int]) -> None:
        self._arenas[message["arena"]] = (fds[0], message["bytes"])

    def _on_forget_arena(self, message: dict[str, Any], _: list[int]) -> None:
        os.close(self._arenas.pop(message["arena"])[0])
        self._seats.each(lambda seat: seat.forget(message))

    def _on_save(self, message: dict[str, Any], fds: list[int]) -> None:
        job = SaveJob.from_json(message["job"])
        self._said_rest = False
        self._schedule.submit(job, message["shards"], staged=bool(fds))
        if fds:
            self._states[job.number] = fds[0]
        else:  # its snapshot has only begun
            self._copying.add(job.number, *self._arenas[job.arena])

    def _on_staged(self, message: dict[str, Any], fds: list[int]) -> None:
        self._copying.discard(message["save"])
        if self._schedule.staged(message["save"]):
            self._states[message["save"]] = fds[0]
        else:  # it has its answer
            os.close(fds[0])

    def _on_withdraw(self, message: dict[str, Any], _: list[int]) -> None:
        self._copying.discard(message["save"])
        self._answer(self._schedule.withdraw(message["save"]))

    def _tell(self, message: dict[str, Any] | None) -> None:
        if self._trainer is None:
            return
        self._said_s = time.monotonic()
        try:
            self._trainer.flush() if message is None else self._trainer.post(message)
        except ConnectionError:
            self._trainer_died()
            return
        mask = selectors.EVENT_READ | (selectors.EVENT_WRITE if self._trainer.pending else 0)
        self._selector.modify(self._trainer, mask, "trainer")

    def _answer(self, ended: Ended | None) -> None:
        if ended is None:
            return
        number = ended.run.job.number
        self._copying.discard(number)  # answered early: nobody tells us when its snapshot is complete
        if (state := self._states.pop(number, None)) is not None:
            os.close(state)
        message: dict[str, Any] = {"op": "ended", "job": number}
        if ended.error is not None:
            message["error"] = errors.to_json(ended.error)
        elif ended.outcome is not None:
            message["outcome"] = ended.outcome.to_json()
        self._tell(message)
        if self._alone is not None:  # or has been since this moment
            self._alone.answered(ended.run.job.step, ended.error)

    # -- the workers

    def _dispatch(self) -> None:
        while True:
            crew = [seat for seat in self._seats if seat.nice <= self._nice]
            free = [seat for seat in crew if not seat.encoding]
            hiring = not free and len(crew) < self._hello["workers"]
            # one encoder always; more of them only while others leave a core idle
            task = self._schedule.next(
                encoder_free=(bool(free) or hiring) and (free == crew or may_encode_more(self._seats)),
                ahead=self._may_start_ahead,
            )
            if task is None:
                return
            if hiring:
                try:
                    free = [self._seats.hire(self._nice)]
                except OSError:  # the limit of processes: go on with those there are
                    if not self._seats:
                        raise
                    self._hello["workers"], self._nice = len(self._seats), max(seat.nice for seat in self._seats)
            self._give(min(free or crew or list(self._seats), key=lambda seat: len(seat.tasks)), task)

    def _may_start_ahead(self) -> bool:
        """Whether a core is idle beside the copy: on one that trains, an encoder gains nothing and slows the copy down."""
        if may_encode_more(self._seats):
            return True
        self._copying.back_off()
        return False

    def _give(self, seat: Seat, task: Task) -> None:
        job = task.run.job
        message: dict[str, Any] = {"op": "task", "task": task.number, "kind": task.kind, "job": job.to_json()}
        fds: list[int] = []
        if task.kind in ("shard", "commit"):
            seat.introduce("structure", job.structure, self._structures[job.structure], {})
            fd, size_bytes = self._arenas[job.arena]
            seat.introduce("arena", job.arena, fd, {"bytes": size_bytes})
        if task.kind == "shard":
            message["shard"] = task.shard
        elif task.kind == "commit":
            receipts = sorted(task.run.receipts.values(), key=lambda receipt: receipt.shard)
            message["receipts"] = [receipt.to_json() for receipt in receipts]
            message["again"] = task.deaths > 0
            fds = [self._states[job.number]]
        seat.give(task, message, fds)
        self._seats.watch(seat)

    def _seat_ready(self, seat: Seat, mask: int) -> None:
        if seat not in self._seats:
            return
        if mask & selectors.EVENT_WRITE:
            seat.flush()
            self._seats.watch(seat)
        if (messages := seat.channel.receive()) is None:
            self._replace(seat, "died")
            return
        seat.heard_s = time.monotonic()
        for message, _ in messages:
            self._heard(seat, message)

    def _heard(self, seat: Seat, message: dict[str, Any]) -> None:
        kind = message["op"]
        if kind == "beat":
            return
        if kind == "refused":
            self._tell(message)
            return
        if kind == "retried":
            for run in self._schedule.runs.values():
                run.retries += 1
            self._tell(message)
            return
        if kind == "encoded":
            seat.encoding = False
            return
        task = seat.tasks.pop(message["task"])
        if self._alone is not None and kind == "done" and task.kind in ("check", "shard", "commit"):
            self._alone.moved()
        if kind == "done":
            self._progress(task, message["data"])
            self._answer(self._schedule.done(task, message["data"]))
        else:
            self._tell_of_upkeep(task, upkeep.told_of_failure(message["data"]))
            self._answer(self._schedule.failed(task, errors.from_json(message["data"])))

    def _progress(self, task: Task, data: dict[str, Any]) -> None:
        if task.kind == "shard":
            sizes = {name: data[name] for name in ("key", "raw_bytes", "stored_bytes")}
            counts = {"shards_done": len(task.run.receipts) + 1, "shards": task.run.shards}
            self._tell({"op": "stored", "data": {"step": task.run.job.step, **sizes, **counts}})
        self._tell_of_upkeep(task, data)

    def _tell_of_upkeep(self, task: Task, data: dict[str, Any]) -> None:
        if task.kind in upkeep.KINDS and any(data.values()):
            self._tell({"op": "upkeep", "kind": task.kind, "data": data})

    def _watch(self) -> None:
        now = time.monotonic()
        for seat in self._seats:
            if seat.tasks and now - seat.heard_s > self._hello["hang_s"]:
                self._replace(seat, f"gave no sign of life for {self._hello['hang_s']:.0f} s")
            elif seat.nice > self._nice and not seat.tasks:
                self._seats.dismiss(seat)
            elif self._nice > STARVED_NICE and seat.starves(now, self._hello["starved_s"]):
                self._nice = STARVED_NICE  # from now on; it may end what it has begun
                self._tell(
                    {"op": "worker_replaced", "reason": f"worker {seat.pid} waited for a core: nice {self._nice}"}
                )
        if self._polls and self._trainer is not None and os.getppid() != self._hello["trainer"]:
            self._trainer_died()
        if self._schedule.idle:
            self._seats.each(Seat.rest)
            if not self._said_rest:
                self._said_rest = True
                self._tell({"op": "rested"})
        elif now - self._said_s > self._hello["alive_s"]:
            self._tell({"op": "alive"})
        self._seats.reap()

    def _replace(self, seat: Seat, reason: str) -> None:
        tasks = list(seat.tasks.values())
        self._seats.dismiss(seat)
        if tasks:
            self._tell({"op": "worker_replaced", "reason": f"worker {seat.pid} {reason}"})
        for task in reversed(tasks):
            self._answer(self._schedule.lost(task, reason))
            if task.deaths >= MAX_DEATHS:
                died = errors.WorkerDiedError(f"{task.deaths} workers in a row died on one {task.kind} task: {reason}")
                self._tell_of_upkeep(task, upkeep.told_of_failure(errors.to_json(died)))


def main(fd: int) -> None:
    """The service's whole life. `fd`: our end of the socketpair; the first message says what to serve."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)  # it ends with its trainer, after what was handed over
    sock = socket.socket(fileno=fd)
    channel = Channel(sock)
    while not (messages := channel.receive()):
        if messages is None:
            return
    hello, fds = messages[0]
    if hello["url"].startswith("s3:"):
        import asyncckpt.store.s3  # noqa: F401, PLC0415 - once here, shared by every worker
    sock.setblocking(False)
    gc.freeze()  # workers share these pages for longer
    service = Service(channel, hello, next(iter(fds), None))
    for message, more in messages[1:]:
        getattr(service, "_on_" + message["op"])(message, more)
    service.run()
