"""Where the lives of a run take place: in this process before a store in memory, or in forked processes."""

import atexit
import contextlib
import functools
import json
import os
import random
import secrets
import select
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store.base import Store
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.opening import open_store
from asyncckpt.store.retry import RetryingStore
from tests.faults.fates import Case, Dice, Point
from tests.faults.files import Files, environment, points_in
from tests.faults.http import Proxy
from tests.faults.lives import Life, live
from tests.faults.oracle import Ledger
from tests.faults.requests import LifeStore, Network
from tests.faults.scenarios import Act
from tests.processes import alive, kill
from tests.servers import ACCESS_KEY, SECRET_KEY, moto_server

LIFE_S = 60.0
"""A forked life that takes longer hangs."""


class Place:
    """`ledger` hears what lives tell. `points`, `fired`: of the lives with faults. `killed`: whether one was killed."""

    url = ""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.ledger = Ledger(self.url, store)
        self.points: list[Point] = []
        self.fired: list[str] = []
        self.killed = False

    def undisturbed(self, number: int, act: Act) -> None:
        """A life without faults."""
        live(Life(number, self._hear, url=self.url, store=self.store, engine="inline"), act)

    def disturbed(self, number: int, act: Act) -> None:
        """A life with the case's faults."""
        raise NotImplementedError

    def deliver(self) -> None:
        """Everything that is on its way arrives."""

    def temporary_files(self) -> list[str]:
        return []

    def close(self) -> None:
        pass

    def _hear(self, **fact: Any) -> None:
        self.ledger.hear(fact)


class _Clock:
    """Time that passes only while somebody sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds


class MemoryPlace(Place):
    """A store with the semantics of S3 in this process; a kill is a store that does nothing any more."""

    def __init__(self, case: Case, store: MemoryStore | None = None) -> None:
        self.url = "memory://faults"
        super().__init__(store or MemoryStore())
        self._network = Network(self.store, Dice(case))

    def disturbed(self, number: int, act: Act) -> None:
        seen = LifeStore(self._network, number)
        clock = _Clock()
        uniform = random.Random(number).uniform
        store = RetryingStore(seen, RetryPolicy(deadline_s=60.0), clock=clock, sleep=clock.sleep, uniform=uniform)
        live(Life(number, self._hear, url=self.url, store=store, engine="inline"), act)
        self.killed = self.killed or seen.dead
        self.points = self._network.points
        self.fired = [f"{point} {fault}" for point, fault in self._network.fired]

    def deliver(self) -> None:
        self._network.deliver(everything=True)


class ForkedPlace(Place):
    """Every disturbed life is a forked process of its own, and a kill is a SIGKILL."""

    def disturbed(self, number: int, act: Act) -> None:
        reading, writing = os.pipe()
        pid = os.fork()
        if pid == 0:
            os.close(reading)
            self._child(writing, number, act)
        os.close(writing)
        try:
            self._listen(reading, pid)
        finally:
            os.close(reading)

    def in_child(self, number: int, tell: Callable[..., None]) -> Life:
        """The life, with its faults around it."""
        raise NotImplementedError

    def _child(self, writing: int, number: int, act: Act) -> None:
        def tell(**fact: Any) -> None:
            os.write(writing, (json.dumps(fact) + "\n").encode())

        try:
            null = os.open(os.devnull, os.O_RDWR)
            os.dup2(null, 2)  # what a killed thread has to say helps nobody
            live(self.in_child(number, tell), act)
        except BaseException as error:
            tell(untyped=f"{type(error).__name__}: {error}")
        finally:
            os._exit(0)

    def _listen(self, reading: int, pid: int) -> None:
        buffer, deadline_s = b"", time.monotonic() + LIFE_S
        while True:
            ready, _, _ = select.select([reading], [], [], max(0.0, deadline_s - time.monotonic()))
            if not ready:
                self._hear(hung=f"a life of {LIFE_S:.0f} s")
                kill(pid)
                break
            piece = os.read(reading, 65536)
            if not piece:
                break
            buffer += piece
            *lines, buffer = buffer.split(b"\n")
            for line in lines:
                self._heard(json.loads(line))
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self.killed = self.killed or status == -signal.SIGKILL

    def _heard(self, fact: dict[str, Any]) -> None:
        if "point" in fact:
            self.points += points_in([fact])
        elif "fired" in fact:
            self.fired.append(" ".join(fact["fired"]))
        else:
            self._hear(**fact)


class LocalPlace(ForkedPlace):
    """A folder, and the engine in the trainer: every file operation is made in the one process."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._folder = Path(tempfile.mkdtemp(prefix="faults-", dir=_memory_folder()))
        self.url = str(self._folder / "run")
        super().__init__(LocalStore(self.url))

    def in_child(self, number: int, tell: Callable[..., None]) -> Life:
        Files(self.url, self._case, number, tell, victims={"trainer": os.getpid()}).install()
        return Life(number, tell, url=self.url, store=None, engine="inline")

    def temporary_files(self) -> list[str]:
        return [path.name for path in Path(self.url).glob(".asyncckpt-unfinished/*") if path.name != "records.lock"]

    def close(self) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)


class ServicePlace(LocalPlace):
    """A folder, and a service with a worker: either of them, the trainer, or all die at the worker's file operations."""

    def in_child(self, number: int, tell: Callable[..., None]) -> Life:
        os.environ.update(environment(self.url, self._case, number, self._folder, os.getpid()))
        return ServiceLife(number, tell, url=self.url, store=None, engine="service")

    def disturbed(self, number: int, act: Act) -> None:
        self._services: list[int] = []
        super().disturbed(number, act)
        deadline_s = time.monotonic() + LIFE_S
        while any(map(alive, services := {*self._services, *(fact["service"] for fact in self._log())})):
            if time.monotonic() > deadline_s:
                self.ledger.hear({"hung": f"services {services} outlive their trainer"})
                for pid in services:
                    kill(pid)
            time.sleep(0.01)
        for fact in self._log():
            self._heard(fact)
        (self._folder / "points").unlink(missing_ok=True)
        (self._folder / "killed").unlink(missing_ok=True)

    def _log(self) -> list[dict[str, Any]]:
        """What workers wrote down, and of which service they were."""
        log = self._folder / "points"
        return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []

    def _heard(self, fact: dict[str, Any]) -> None:
        if list(fact) == ["service"]:
            self._services.append(fact["service"])
            return
        super()._heard(fact)
        self.killed = self.killed or ("fired" in fact and fact["fired"][1].startswith("kill"))


class ServiceLife(Life):
    """Tells the service's process id before anything is acknowledged."""

    def save(self, saver, step, *, writer=0):
        def tell(**fact: Any) -> None:
            engine = saver._launcher._engine
            if engine is not None:
                self.tell(service=engine.pid)
            self.tell(**fact)

        Life(self.number, tell, url=self.url, store=None).save(saver, step, writer=writer)


class S3Place(ForkedPlace):
    """A real S3 server behind a proxy that has the faults; the engine in the trainer."""

    def __init__(self, case: Case) -> None:
        endpoint, bucket = s3_server()
        prefix = f"run-{secrets.token_hex(6)}"
        self.url = f"s3://{bucket}/{prefix}"
        super().__init__(open_store(self.url, S3Options(endpoint_url=endpoint)))
        self._proxy = Proxy(endpoint, f"{bucket}/{prefix}", Dice(case))

    def disturbed(self, number: int, act: Act) -> None:
        super().disturbed(number, act)
        facts = self._proxy.ask("facts")
        self.points = points_in([{"point": point} for point in facts["points"]])
        self.fired = facts["fired"]

    def in_child(self, number: int, tell: Callable[..., None]) -> Life:
        self._proxy.ask("begin", number, os.getpid())
        retry = RetryPolicy(deadline_s=1.5, first_wait_s=0.01, max_wait_s=0.1)
        store = S3Options(endpoint_url=self._proxy.url, retry=retry)
        return Life(number, tell, url=self.url, store=store, engine="inline")

    def deliver(self) -> None:
        self._proxy.ask("deliver")

    def close(self) -> None:
        self._proxy.close()
        self.store.close()


@functools.cache
def s3_server() -> tuple[str, str]:
    """One server for this process and those that it forks: its address, and a bucket."""
    import boto3

    os.environ.update(
        AWS_ACCESS_KEY_ID=ACCESS_KEY,
        AWS_SECRET_ACCESS_KEY=SECRET_KEY,
        AWS_DEFAULT_REGION="us-east-1",
        AWS_EC2_METADATA_DISABLED="true",
    )
    stack = contextlib.ExitStack()
    endpoint = stack.enter_context(moto_server())
    atexit.register(stack.close)
    with contextlib.closing(boto3.client("s3", endpoint_url=endpoint)) as client:
        client.create_bucket(Bucket="faults")
    return endpoint, "faults"


def _memory_folder() -> str | None:
    """A filesystem in memory where there is one: what a kill leaves is the same, and the disk's other users wait for nothing."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


PLACES: dict[str, Callable[[Case], Place]] = {
    "memory": MemoryPlace,
    "local": LocalPlace,
    "service": ServicePlace,
    "s3": S3Place,
}
