"""Asks a store again after transient failures, until a deadline; the one file that imports tenacity."""

import logging
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

import tenacity

from asyncckpt.errors import (
    DeadlineExceededError,
    ObjectChangedError,
    ObjectNotFoundError,
    ResourceLimitError,
    StoreError,
    TransientStoreError,
    told,
)
from asyncckpt.events import StoreRetried
from asyncckpt.options import RetryPolicy
from asyncckpt.store.base import Buffer, Buffers, Entry, OpenUpload, Progress, Store, Upload, Version

_LOG = logging.getLogger("asyncckpt")
_ABORT_DEADLINE_S = 60.0  # an abort cleans up behind a failure that somebody waits to hear of
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
        sleep: Called for at most a second at a time.
        progress: Called between the slices of a sleep.
        on_retry: Told of every retry; called on the thread that retries.
        uniform: Draws a wait from two bounds.
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
    ) -> None:
        self._inner = inner
        self._policy = policy or RetryPolicy()
        self._clock = clock
        self._sleep = sleep
        self._progress = progress or (lambda: None)
        self._on_retry = on_retry or (lambda _: None)
        self._uniform = uniform or random.Random().uniform  # noqa: S311 - spreads load, guards nothing
        self.conditional_puts = inner.conditional_puts
        self.rereads = inner.rereads
        deadline_s = self._policy.deadline_s if inner.patience.deadline_s else 0.0
        self.patience = replace(inner.patience, deadline_s=deadline_s, clock=clock, sleep=sleep)
        self.min_part_bytes = inner.min_part_bytes
        self.max_put_bytes = inner.max_put_bytes
        self.max_parts = inner.max_parts

    def put(self, key: str, data: Buffers, *, if_absent: bool = False) -> None:
        """As the contract says; but after a lost answer `ObjectExistsError` may be raised against our own put: it is `unanswered` then."""
        self._try("put", key, lambda: self._inner.put(key, data, if_absent=if_absent))

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
            yield RetryingStore(
                inner,
                self._policy,
                clock=self._clock,
                sleep=self._sleep,
                progress=self._progress,
                on_retry=self._on_retry,
                uniform=self._uniform,
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
        self._inner.close()

    def _try(self, operation: str, key: str, call: Callable[[], T], *, deadline_s: float | None = None) -> T:
        """The answer of `call`, or its first failure that is not transient, or `DeadlineExceededError`."""
        started_s = self._clock()
        try:
            return (
                call()
            )  # nearly every request ends here, and tenacity's machinery costs more than a read of a megabyte
        except TransientStoreError as error:
            failures = [error]
            unanswered = error.unanswered

        def again() -> T:
            nonlocal unanswered
            try:
                if failures:
                    raise failures.pop()
                return call()
            except StoreError as error:
                unanswered = error.unanswered = unanswered or error.unanswered
                raise

        end_s = started_s + (self._policy.deadline_s if deadline_s is None else deadline_s)
        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception_type(TransientStoreError),
            stop=lambda _: self._clock() >= end_s,
            wait=lambda state: min(self._wait_s(state.attempt_number), max(end_s - self._clock(), 0.0)),
            sleep=self._sleep_alive,
            before_sleep=lambda state: self._tell(operation, key, state),
        )
        try:
            return retrying(again)
        except tenacity.RetryError as error:
            tries = error.last_attempt.attempt_number
            last = error.last_attempt.exception()
            about = (last.key if isinstance(last, StoreError) else None) or key
            took_s = self._clock() - started_s
            late = DeadlineExceededError(
                f"{operation} failed for {took_s:.0f} s, {tries} tries; the last said: {told(last)}", key=about
            )
            late.unanswered = unanswered
            raise late from last

    def _wait_s(self, tries: int) -> float:
        bound_s = min(self._policy.first_wait_s * 2.0 ** min(tries - 1, 60), self._policy.max_wait_s)
        return self._uniform(0.0, bound_s)

    def _sleep_alive(self, wait_s: float) -> None:
        while wait_s > 0:
            self._progress()
            self._sleep(min(wait_s, _SLICE_S))
            wait_s -= _SLICE_S
        self._progress()

    def _tell(self, operation: str, key: str, state: tenacity.RetryCallState) -> None:
        wait_s = state.next_action.sleep if state.next_action else 0.0
        error = state.outcome.exception() if state.outcome else None
        _LOG.info("%s of %s failed and is tried again in %.1f s: %s", operation, key, wait_s, error)
        self._on_retry(StoreRetried(operation, key, state.attempt_number, wait_s, str(error)))


class _RetryingUpload(Upload):
    """Retries each step of an upload by itself."""

    def __init__(self, store: RetryingStore, key: str, inner: Upload) -> None:
        self._store = store
        self._key = key
        self._inner = inner

    def write(self, part: int, offset: int, data: Buffers) -> None:
        self._store._try("write", self._key, lambda: self._inner.write(part, offset, data))

    def complete(self) -> None:
        self._store._try("complete", self._key, self._inner.complete)

    def abort(self) -> None:
        """Never raises: what could not be aborted is logged, and a lifecycle rule of the bucket removes it."""
        deadline_s = min(_ABORT_DEADLINE_S, self._store._policy.deadline_s)
        try:
            self._store._try("abort", self._key, self._inner.abort, deadline_s=deadline_s)
        except StoreError as error:
            _LOG.warning("an upload of %s was left open: %s", self._key, error)
