"""Asks a store again after transient failures, until a deadline; the one file that imports tenacity."""

import logging
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Generic, TypeVar

import tenacity

from asyncckpt.errors import (
    DeadlineExceededError,
    ObjectChangedError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
    StoreNotFoundError,
    TransientStoreError,
    told,
)
from asyncckpt.events import StoreRetried
from asyncckpt.options import RetryPolicy
from asyncckpt.store.away import Contact
from asyncckpt.store.base import Buffer, Buffers, Entry, OpenUpload, Progress, Store, Upload, Version
from asyncckpt.store.errand import Errand

_LOG = logging.getLogger("asyncckpt")
_ABORT_DEADLINE_S = 60.0  # an abort cleans up behind a failure
_SLICE_S = 1.0  # of a sleep, between two signs of life

T = TypeVar("T")


class RetryingStore(Store):
    """Retries `TransientStoreError` of `inner`, and nothing else.

    An error that is raised after a try that had no answer is `unanswered` too: what that try sent may still take effect, whatever
    the store said to the next one.

    Waits are drawn evenly below a doubling bound ("full jitter", https://aws.amazon.com/blogs/architecture/
    exponential-backoff-and-jitter/) from a generator of its own: the global one belongs to the training.

    Args:
        inner: The store to ask.
        policy: Deadline and waits.
        clock: Monotonic seconds.
        sleep: Called for at most a second at a time. One of your own is not ended early when an errand is given up.
        progress: Called between the slices of a sleep.
        on_retry: Told of every retry; called on the thread that retries.
        uniform: Draws a wait from two bounds.
        errand: What the requests are for; it is given up as a whole, and then they have no deadline of their own.
        contact: Hears of every request, and knows whether anybody ever answered there.
    """

    def __init__(
        self,
        inner: Store,
        policy: RetryPolicy | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        progress: Progress | None = None,
        on_retry: Callable[[StoreRetried], None] | None = None,
        uniform: Callable[[float, float], float] | None = None,
        errand: Errand | None = None,
        contact: Contact | None = None,
    ) -> None:
        self._inner = inner
        self._contact = contact
        self.policy = policy or RetryPolicy()
        self._errand = errand
        self.clock = clock
        self._sleep = sleep
        self._progress = progress or (lambda: None)
        self._on_retry = on_retry or (lambda _: None)
        self._uniform = uniform or random.Random().uniform  # noqa: S311 - spreads load, guards nothing
        self.conditional_puts = inner.conditional_puts
        self.rereads = inner.rereads
        deadline_s = self.policy.deadline_s if inner.patience.deadline_s else 0.0
        self.patience = replace(
            inner.patience, deadline_s=deadline_s, clock=clock, sleep=sleep if errand is None else errand.sleep
        )
        self.min_part_bytes = inner.min_part_bytes
        self.max_put_bytes = inner.max_put_bytes
        self.max_parts = inner.max_parts

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        """As the contract says; but after a lost answer `ObjectExistsError` may be raised against our own put: it is `unanswered` then."""
        self._try("put", key, lambda: self._inner.put(key, data, if_absent=if_absent))
        self._acknowledged()

    def start_upload(self, key: str) -> Upload:
        return _RetryingUpload(self, key, self._try("start_upload", key, lambda: self._inner.start_upload(key)))

    def part_bytes(self, most_bytes: int) -> int:
        return self._inner.part_bytes(most_bytes)

    def gather(self) -> list[Buffer]:
        return self._inner.gather()

    def get(self, key: str, *, max_bytes: int) -> bytes:
        return self._try("get", key, lambda: self._inner.get(key, max_bytes=max_bytes))

    def get_into(self, key: str, start: int, target: memoryview) -> None:
        self._try("get_into", key, lambda: self._inner.get_into(key, start, target))

    @contextmanager
    def afresh(self) -> Iterator[Store]:
        with self._inner.afresh() as inner:
            yield self._like(inner, self._errand)

    def on(self, errand: Errand) -> Store:
        return self._like(self._inner, errand)

    def _like(self, inner: Store, errand: Errand | None) -> "RetryingStore":
        return RetryingStore(
            inner,
            self.policy,
            clock=self.clock,
            sleep=self._sleep,
            progress=self._progress,
            on_retry=self._on_retry,
            uniform=self._uniform,
            errand=errand,
            contact=self._contact,
        )

    def head(self, key: str) -> Entry | None:
        return self._try("head", key, lambda: self._inner.head(key))

    def list(self, prefix: str = "", *, delimiter: bool = False, start_after: str = "") -> Iterator[Entry]:
        """As the contract says. After a failure the listing goes on behind what was told."""
        lines = self._inner.list(prefix, delimiter=delimiter, start_after=start_after)

        def following() -> Entry | None:
            nonlocal lines
            try:
                return next(lines, None)
            except StoreError:  # a generator that raised has ended
                lines = self._inner.list(prefix, delimiter=delimiter, start_after=start_after)
                raise

        while (line := self._try("list", prefix, following)) is not None:
            start_after = line.key
            yield line

    def get_version(self, key: str, *, max_bytes: int) -> Version:
        return self._try("get", key, lambda: self._inner.get_version(key, max_bytes=max_bytes))

    def replace(self, key: str, data: Buffers, old: Version) -> None:
        """As the contract says; but after a lost answer `ObjectChangedError` may be raised against our own put.

        So after an error that is `unanswered` read the object: what stands there tells. After another one nothing was changed.
        """
        self._try("replace", key, lambda: self._inner.replace(key, data, old))
        self._acknowledged()

    def remove(self, key: str, old: Version) -> None:
        """As the contract says. After a try without an answer the object is read before another is sent.

        So what somebody puts there meanwhile stays, also at a store that ignores the condition of a deletion. `ObjectChangedError`:
        what was read as `old` is gone, by us or by somebody else, and another object stands there. Any other error that is
        `unanswered`: it may be gone, now or later.
        """
        answered = True

        def send() -> None:
            nonlocal answered
            try:
                if not answered and not self._still_there(key, old):
                    return
                self._inner.remove(key, old)
            except TransientStoreError as error:
                answered = answered and not error.unanswered
                raise

        self._try("remove", key, send)

    def _still_there(self, key: str, old: Version) -> bool:
        """Whether `old` stands: False if nothing does, `ObjectChangedError` if another object does."""
        try:
            found = self._inner.get_version(key, max_bytes=len(old.data))
        except ObjectNotFoundError:
            return False
        except ResourceLimitError:
            found = None
        if found != old:
            raise ObjectChangedError("another object stands there by now", key=key)
        return True

    def delete(self, keys: Iterable[str]) -> None:
        names = tuple(keys)
        self._try("delete", names[0] if names else "", lambda: self._inner.delete(names))

    def clock_s(self) -> float:
        return self._try("clock", "", self._inner.clock_s)

    def open_uploads(self, prefix: str = "", *, idle_since_s: float | None = None) -> Sequence[OpenUpload]:
        return self._try("open_uploads", prefix, lambda: self._inner.open_uploads(prefix, idle_since_s=idle_since_s))

    def abort_upload(self, upload: OpenUpload) -> None:
        self._try("abort_upload", upload.key, lambda: self._inner.abort_upload(upload))

    def close(self) -> None:
        if self._contact is not None:
            self._contact.close()
        self._inner.close()

    def _acknowledged(self) -> None:
        if self._errand is not None:
            self._errand.acknowledged()

    def _try(self, operation: str, key: str, call: Callable[[], T], *, deadline_s: float | None = None) -> T:
        """The answer of `call`, or its first failure that is not transient, or `DeadlineExceededError`.

        With `deadline_s` the errand is not asked: what was begun is taken back also when it was given up.
        """
        errand = self._errand if deadline_s is None else None
        if errand is not None and errand.given_up:
            raise _never_sent(operation, key)
        contact = self._contact
        if contact is None:
            return self._try_in_time(operation, key, call, errand, deadline_s)
        ticket = contact.asks()
        try:
            return self._try_in_time(operation, key, lambda: _told(contact, call), errand, deadline_s)
        finally:
            contact.ends(ticket)

    def _try_in_time(
        self, operation: str, key: str, call: Callable[[], T], errand: Errand | None, deadline_s: float | None
    ) -> T:
        began_s = self.clock()
        try:
            return (
                call()
            )  # nearly every request ends here, and tenacity's machinery costs more than a read of a megabyte
        except TransientStoreError as error:
            trial = _Trial(operation, key, call, error, began_s)
        if errand is None:
            end_s = began_s + (self.policy.deadline_s if deadline_s is None else deadline_s)
            return self._try_again(trial, end_s, None)
        errand.fails(began_s)
        try:
            return self._try_again(trial, math.inf, errand)
        finally:
            errand.ends()

    def _try_again(self, trial: "_Trial[T]", end_s: float, errand: Errand | None) -> T:
        def is_given_up() -> bool:
            return errand is not None and errand.given_up

        first_end_s = min(end_s, trial.began_s + self.policy.first_contact_s)

        def left_s() -> float:
            return (first_end_s if self._finds_nobody(trial) else end_s) - self.clock()

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientStoreError),
            stop=lambda _: is_given_up() or left_s() <= 0,
            wait=lambda state: min(self._wait_s(state.attempt_number), max(left_s(), 0.0)),
            sleep=lambda wait_s: self._sleep_alive(wait_s, errand),
            before_sleep=lambda state: self._tell(trial, state),
        )
        try:
            return retrying(lambda: trial.again(is_given_up()))
        except tenacity.RetryError:
            took_s = self.clock() - trial.began_s
            if self._finds_nobody(trial) and self.clock() >= first_end_s:
                raise _nobody(trial, took_s) from trial.last
            late = DeadlineExceededError(
                f"{trial.operation} failed for {took_s:.0f} s, {trial.tries} tries; the last said: {told(trial.last)}",
                key=trial.last.key or trial.key,
            )
            late.unanswered = trial.last.unanswered
            raise late from trial.last
        finally:
            # tenacity's objects lead to each other, and to this: views of an arena would live until garbage is collected
            trial.call, trial.last = _over, TransientStoreError("over")

    def _finds_nobody(self, trial: "_Trial[T]") -> bool:
        """Whether this is first contact, and nobody is found there: rather a wrong address than an outage."""
        return self._contact is not None and trial.last.unreached and not self._contact.is_met

    def _wait_s(self, tries: int) -> float:
        bound_s = min(self.policy.first_wait_s * 2.0 ** min(tries - 1, 60), self.policy.max_wait_s)
        return self._uniform(0.0, bound_s)

    def _sleep_alive(self, wait_s: float, errand: Errand | None) -> None:
        sleep = self._sleep if errand is None or self._sleep is not time.sleep else errand.sleep
        while wait_s > 0 and not (errand is not None and errand.given_up):
            self._progress()
            sleep(min(wait_s, _SLICE_S))
            wait_s -= _SLICE_S
        self._progress()

    def _tell(self, trial: "_Trial[T]", state: tenacity.RetryCallState) -> None:
        wait_s = state.next_action.sleep if state.next_action else 0.0
        _LOG.info("%s of %s failed and is tried again in %.1f s: %s", trial.operation, trial.key, wait_s, trial.last)
        told = self._errand.retried if self._errand is not None else None
        (told or self._on_retry)(StoreRetried(trial.operation, trial.key, trial.tries, wait_s, str(trial.last)))


@dataclass(slots=True)
class _Trial(Generic[T]):
    """A request whose first try failed. `last`: what the latest one said, `unanswered` if any of them had no answer."""

    operation: str
    key: str
    call: Callable[[], T]
    last: TransientStoreError
    began_s: float
    tries: int = 0

    def again(self, given_up: bool) -> T:
        """The next try. The first one is over, and whoever was woken from a wait because all is given up sends nothing."""
        if not self.tries or given_up:
            self.tries = max(self.tries, 1)
            raise self.last
        self.tries += 1
        try:
            return self.call()
        except StoreError as error:
            error.unanswered = self.last.unanswered or error.unanswered
            if isinstance(error, TransientStoreError):
                self.last = error
            raise


def _over() -> Any:
    raise AssertionError("this request has its answer")


def _told(contact: Contact, call: Callable[[], T]) -> T:
    """The answer of one try, of which the contact hears."""
    try:
        answer = call()
    except StoreError as error:
        contact.fails(error)
        raise
    contact.answers()
    return answer


def _nobody(trial: _Trial[Any], took_s: float) -> StoreNotFoundError:
    return StoreNotFoundError(
        f"nobody answers there, and nobody ever did: {trial.tries} tries of {trial.operation} in {took_s:.0f} s; the last said: {trial.last.message}; "
        "check the endpoint (S3Options(endpoint_url=...), AWS_ENDPOINT_URL_S3), the network and the proxy. If the store only starts "
        "later than this, raise RetryPolicy.first_contact_s",
        key=trial.key,
    )


def _never_sent(operation: str, key: str) -> DeadlineExceededError:
    error = DeadlineExceededError(f"{operation} was not sent: what it is for has been given up", key=key)
    error.unanswered = False
    return error


class _RetryingUpload(Upload):
    """Retries each step of an upload by itself."""

    def __init__(self, store: RetryingStore, key: str, inner: Upload) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    def write(self, part: int, offset: int, data: Buffers) -> None:
        self._store._try("write", self._key, lambda: self._inner.write(part, offset, data))
        self._store._acknowledged()

    def complete(self) -> None:
        self._store._try("complete", self._key, self._inner.complete)
        self._store._acknowledged()

    def abort(self) -> None:
        """Never raises: what could not be aborted is logged, and a lifecycle rule of the bucket removes it."""
        errand = self._store._errand
        left_s = _ABORT_DEADLINE_S if errand is None else errand.cleanup_left_s()
        deadline_s = min(left_s, self._store.policy.deadline_s)
        try:
            self._store._try("abort", self._key, self._inner.abort, deadline_s=deadline_s)
        except StoreError as error:
            _LOG.warning("an upload of %s was left open: %s", self._key, error)
