"""Faults of a store's requests, inside the process: the fastest level, some hundred runs a second."""

import contextlib
import threading
from collections.abc import Callable, Sequence

from asyncckpt.errors import ObjectNotFoundError, StoreAuthError, StoreError, TransientStoreError
from asyncckpt.store.base import Upload
from asyncckpt.store.memory import MemoryStore
from tests.faults.fates import ALWAYS, KILLS, Dice, Names, Point
from tests.faulty import FaultyStore


class KilledError(StoreError):
    """The process is dead: none of its requests has an effect any more."""


class Network:
    """What stands between the lives of a run and the one store that outlives them.

    `points`: every request that was made, in order. `fired`: the faults that met one.
    """

    def __init__(self, store: MemoryStore, dice: Dice) -> None:
        self.store = store
        self.dice = dice
        self.names = Names()
        self.lock = threading.RLock()
        self.points: list[Point] = []
        self.fired: list[tuple[Point, str]] = []
        self._late: list[tuple[int, Callable[[], object]]] = []

    def later(self, requests: int, call: Callable[[], object]) -> None:
        self._late.append((len(self.points) + requests, call))

    def deliver(self, *, everything: bool = False) -> None:
        """Let late requests arrive whose time has come. Nobody hears their answers."""
        due = [late for late in self._late if everything or late[0] <= len(self.points)]
        self._late = [late for late in self._late if late not in due]
        for _, call in due:
            with contextlib.suppress(StoreError):
                call()


class LifeStore(FaultyStore):
    """The store as one life sees it, through the network. One request at a time: a run is the same run every time."""

    def __init__(self, network: Network, life: int) -> None:
        super().__init__(network.store)
        self.conditional_puts = "unproven"  # as S3: the first commit has to find out
        self._network = network
        self._life = life
        self._over = ""  # how this life, or its network, ended
        self._always: dict[tuple[str, str], str] = {}  # faults of every try of a request

    @property
    def dead(self) -> bool:
        return self._over in KILLS

    def put(self, key, data, *, if_absent=False):
        content = [bytes(piece) for piece in data]  # it may arrive when the caller's memory holds something else
        self.run("put", key, lambda: self.inner.put(key, content, if_absent=if_absent))

    def replace(self, key, data, old):
        content = [bytes(piece) for piece in data]
        self.run("replace", key, lambda: self.inner.replace(key, content, old))

    def start_upload(self, key):
        upload = super().start_upload(key)
        upload.inner = _S3Upload(upload.inner)
        return upload

    def list(self, prefix="", *, delimiter=False, start_after=""):
        yield from self.run(
            "list", prefix, lambda: list(self.inner.list(prefix, delimiter=delimiter, start_after=start_after))
        )

    def run(self, operation, key, call):
        network = self._network
        with network.lock:
            if self._over:
                raise self._error(key)
            point = network.names.point(self._life, operation, key)
            network.points.append(point)
            network.deliver()
            fault = self._always.get((operation, key)) or network.dice.fault(point)
            if not fault:
                return call()
            network.fired.append((point, fault))
            return self._meet(fault, point, key, call)

    def _meet(self, fault, point, key, call):
        if fault.endswith(ALWAYS):
            self._always[point.operation, key] = fault
            fault = fault.removesuffix(ALWAYS)
        if fault in (*KILLS, "outage"):
            self._over = fault
        if fault in ("late", "doubled"):
            self._network.later(self._network.dice.delay(point), call)
        if fault in ("kill-after", "lost-answer", "doubled"):
            answer = call()
            if fault == "doubled":
                return answer
        if fault == "refused":
            raise StoreAuthError("injected: refused", key=key)
        if fault == "absent":
            raise ObjectNotFoundError("injected: no such object", key=key)
        raise self._error(key)

    def _error(self, key):
        return KilledError("killed", key=key) if self.dead else TransientStoreError("injected", key=key)


class _S3Upload(Upload):
    """Says of an upload that was completed already that it is complete, as the store of S3 does by looking."""

    def __init__(self, inner: Upload) -> None:
        self._inner = inner
        self._completed = False

    def write(self, part, offset, data):
        self._inner.write(part, offset, data)

    def complete(self):
        if not self._completed:
            self._inner.complete()
            self._completed = True

    def abort(self):
        self._inner.abort()


class ForgetfulStore(MemoryStore):
    """Acknowledges the `nth` put of a shard, and keeps nothing of it. To see whether the oracle sees."""

    def __init__(self, nth: int) -> None:
        super().__init__()
        self._left = nth

    def start_upload(self, key):
        self._left -= 1
        return _LostUpload() if self._left == 0 else super().start_upload(key)


class _LostUpload(Upload):
    def write(self, part, offset, data):
        pass

    def complete(self):
        pass

    def abort(self):
        pass


class OverwritingStore(MemoryStore):
    """Puts a record whether one stands there or not. To see whether the oracle sees."""

    def put(self, key, data, *, if_absent=False):
        super().put(key, data, if_absent=if_absent and not key.endswith(".json"))


class UnconditionalStore(MemoryStore):
    """Replaces and removes records whoever wrote them, as by DELETE and PUT without a condition. To see whether the oracle sees."""

    def replace(self, key, data, old):
        if not key.endswith(".json"):  # on which a Saver proves the condition
            super().replace(key, data, old)
        self.delete([key])
        self.put(key, data)

    def remove(self, key, old):
        self.delete([key])


class HidingStore(MemoryStore):
    """Deletes, once retention begins to, the newest record instead of the one it was asked for. To see whether the oracle sees."""

    def delete(self, keys: Sequence[str]):
        super().delete([self._other(key) for key in keys])

    def remove(self, key, old):
        super().delete([self._other(key)])

    def _other(self, key: str) -> str:
        records = [entry.key for entry in self.list(delimiter=True) if entry.key.endswith(".json")]
        return records[-1] if key in records else key
