"""Retries: what is asked again, how long, and what is told meanwhile. Time is a number here."""

import logging
import random

import pytest

from asyncckpt import errors
from asyncckpt.errors import (
    DeadlineExceededError,
    DiskFullError,
    LocalIOError,
    ObjectChangedError,
    ObjectExistsError,
    StoreAuthError,
    StoreError,
    TransientStoreError,
)
from asyncckpt.events import StoreRetried
from asyncckpt.options import RetryPolicy
from asyncckpt.store.base import Version
from asyncckpt.store.errand import Errand, within
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.retry import RetryingStore
from tests.faulty import FaultyStore

ALWAYS = range(1, 10**9)


class Time:
    """A clock that only sleeping moves."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.slept: list[float] = []

    def clock(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        assert seconds >= 0
        self.slept.append(seconds)
        self.now_s += seconds


@pytest.fixture
def time() -> Time:
    return Time()


def retrying(inner: FaultyStore, time: Time, policy: RetryPolicy | None = None, **options) -> RetryingStore:
    options = {"uniform": lambda low, high: high} | options
    return RetryingStore(inner, policy, clock=time.clock, sleep=time.sleep, **options)


def test_a_transient_failure_is_asked_again(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), {1, 2, 3})
    retrying(inner, time).put("key", [b"x"])
    assert inner.calls == [("put", "key")] * 4
    assert inner.inner.get("key", max_bytes=1) == b"x"


@pytest.mark.parametrize(
    "kind", [StoreAuthError, ObjectExistsError, DiskFullError, LocalIOError, StoreError, ValueError]
)
def test_any_other_failure_is_raised_at_once(time: Time, kind: type[Exception]) -> None:
    inner = FaultyStore(MemoryStore(), {1}, error=lambda: kind("injected"))
    with pytest.raises(kind, match="injected"):
        retrying(inner, time).put("key", [b"x"])
    assert len(inner.calls) == 1
    assert time.slept == []


def test_waits_double_up_to_their_bound(time: Time) -> None:
    waits = []
    policy = RetryPolicy(deadline_s=1000, first_wait_s=0.5, max_wait_s=4)
    store = retrying(
        FaultyStore(MemoryStore(), range(1, 7)), time, policy, on_retry=lambda event: waits.append(event.wait_s)
    )
    store.put("key", [b"x"])
    assert waits == [0.5, 1, 2, 4, 4, 4]
    assert sum(time.slept) == sum(waits)


def test_waits_are_drawn_evenly_below_the_bound(time: Time) -> None:
    drawn = []
    policy = RetryPolicy(first_wait_s=2, max_wait_s=2)
    inner = FaultyStore(MemoryStore(), range(1, 4))
    retrying(inner, time, policy, uniform=lambda low, high: drawn.append((low, high)) or 0.0).head("key")
    assert drawn == [(0, 2)] * 3


def test_the_global_random_numbers_belong_to_the_training(time: Time) -> None:
    random.seed(7)
    expected = random.random()
    random.seed(7)
    RetryingStore(FaultyStore(MemoryStore(), {1, 2}), clock=time.clock, sleep=time.sleep).head("key")
    assert random.random() == expected


def test_a_sleep_shows_signs_of_life_every_second(time: Time) -> None:
    beats = []
    policy = RetryPolicy(first_wait_s=7.5, max_wait_s=7.5)
    retrying(FaultyStore(MemoryStore(), {1}), time, policy, progress=lambda: beats.append(time.now_s)).head("key")
    assert time.slept == [1.0] * 7 + [0.5]
    assert len(beats) >= 8


def test_at_the_deadline_the_last_failure_is_told_with_key_and_duration(time: Time) -> None:
    policy = RetryPolicy(deadline_s=600)
    inner = FaultyStore(MemoryStore(), ALWAYS, error=lambda: TransientStoreError("SlowDown"))
    with pytest.raises(
        DeadlineExceededError, match=r"put failed for 600 s, .* tries; the last said: SlowDown"
    ) as caught:
        retrying(inner, time, policy).put("folder/key", [b"x"])
    assert caught.value.key == "folder/key"
    assert isinstance(caught.value.__cause__, TransientStoreError)
    assert time.now_s == 1600  # a last try at the deadline, not one wait later


def test_a_deadline_of_zero_asks_once(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS)
    with pytest.raises(DeadlineExceededError):
        retrying(inner, time, RetryPolicy(deadline_s=0)).head("key")
    assert len(inner.calls) == 1


def test_every_retry_is_an_event(time: Time) -> None:
    told: list[StoreRetried] = []
    inner = FaultyStore(MemoryStore(), {1, 2}, error=lambda: TransientStoreError("reset"))
    retrying(inner, time, RetryPolicy(first_wait_s=1, max_wait_s=9), on_retry=told.append).put("key", [b"x"])
    assert told == [StoreRetried("put", "key", 1, 1.0, "reset"), StoreRetried("put", "key", 2, 2.0, "reset")]


def test_every_operation_is_retried(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), range(1, 10**6, 2))
    store = retrying(inner, time)
    upload = store.start_upload("a")
    upload.write(1, 0, [b"uploaded"])
    upload.complete()
    store.put("b", [b"put"])
    assert store.get("a", max_bytes=100) == b"uploaded"
    target = bytearray(3)
    store.get_into("b", 0, memoryview(target))
    assert target == b"put"
    assert store.head("b") is not None
    assert [entry.key for entry in store.list()] == ["a", "b"]
    store.delete(iter(["a", "b"]))
    assert [entry.key for entry in store.list()] == []
    store.start_upload("c").abort()
    assert {operation for operation, _ in inner.calls} == {
        *("start_upload", "write", "complete", "put", "get", "get_into", "head", "list", "delete", "abort")
    }


def test_a_put_if_absent_whose_answer_was_lost_reads_as_taken(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), {1}, after=True)
    with pytest.raises(ObjectExistsError):
        retrying(inner, time).put("key", [b"mine"], if_absent=True)
    assert inner.inner.get("key", max_bytes=10) == b"mine"


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("failing", [{1}, {3}, {2, 3, 4}, {5, 6}])
def test_a_listing_that_broke_goes_on_where_it_was(time: Time, failing: set[int], after: bool) -> None:
    inner = FaultyStore(MemoryStore(), failing, after=after)
    for name in "abcde":
        inner.inner.put(name, [b"x"])
    assert [entry.key for entry in retrying(inner, time).list()] == list("abcde")


@pytest.mark.parametrize("kind", [TransientStoreError, StoreAuthError])
def test_abort_never_raises_and_gives_up_early(
    time: Time, kind: type[StoreError], caplog: pytest.LogCaptureFixture
) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS, error=lambda: kind("down"), operations={"abort"})
    upload = retrying(inner, time).start_upload("a/shard")
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        upload.abort()
    assert "a/shard was left open" in caplog.text
    assert time.now_s <= 1000 + 60


def test_limits_of_the_inner_store_show_through(time: Time) -> None:
    inner = MemoryStore()
    inner.min_part_bytes, inner.max_put_bytes, inner.max_parts = 5, 6, 7
    inner.conditional_puts = "single_writer"
    store = RetryingStore(inner)
    assert (store.min_part_bytes, store.max_put_bytes, store.max_parts) == (5, 6, 7)
    assert store.conditional_puts == "single_writer"


def refused() -> TransientStoreError:
    error = TransientStoreError("SlowDown")
    error.unanswered = False
    return error


CHANGES = {
    "put": lambda store: store.put("key", [b"new"]),
    "replace": lambda store: store.replace("key", [b"new"], Version(b"old", "")),
    "remove": lambda store: store.remove("key", Version(b"old", "")),
}


@pytest.mark.parametrize("named", CHANGES)
@pytest.mark.parametrize("kind", [StoreAuthError, DiskFullError, ObjectChangedError])
def test_a_definite_answer_does_not_hide_an_earlier_send_without_one(
    time: Time, named: str, kind: type[StoreError]
) -> None:
    failures = [kind("no"), TransientStoreError("the answer was lost")]
    inner = FaultyStore(MemoryStore(), {1, 2}, error=failures.pop, operations={named})
    inner.inner.put("key", [b"old"])
    with pytest.raises(kind) as caught:
        CHANGES[named](retrying(inner, time))
    assert caught.value.unanswered
    assert errors.from_json(errors.to_json(caught.value)).unanswered


@pytest.mark.parametrize("named", CHANGES)
def test_a_definite_answer_behind_refusals_says_that_nothing_was_done(time: Time, named: str) -> None:
    failures = [StoreAuthError("no"), refused(), refused()]
    inner = FaultyStore(MemoryStore(), {1, 2, 3}, error=failures.pop, operations={named})
    inner.inner.put("key", [b"old"])
    with pytest.raises(StoreAuthError) as caught:
        CHANGES[named](retrying(inner, time))
    assert not caught.value.unanswered
    assert not errors.from_json(errors.to_json(caught.value)).unanswered


@pytest.mark.parametrize("named", CHANGES)
@pytest.mark.parametrize(("failure", "unanswered"), [(refused, False), (lambda: TransientStoreError("lost"), True)])
def test_at_the_deadline_it_is_known_whether_a_send_was_unanswered(
    time: Time, named: str, failure, unanswered: bool
) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS, error=failure, operations={named})
    inner.inner.put("key", [b"old"])
    with pytest.raises(DeadlineExceededError) as caught:
        CHANGES[named](retrying(inner, time))
    assert caught.value.unanswered is unanswered


def test_a_replacement_whose_answer_was_lost_reads_as_changed(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), {1}, after=True, operations={"replace"})
    inner.inner.put("key", [b"old"])
    with pytest.raises(ObjectChangedError) as caught:
        retrying(inner, time).replace("key", [b"mine"], Version(b"old", ""))
    assert caught.value.unanswered
    assert inner.inner.get("key", max_bytes=10) == b"mine"


class IgnoringStore(MemoryStore):
    """Deletes whatever stands there, as MinIO does."""

    def remove(self, key: str, old: Version) -> None:
        self.delete([key])


@pytest.mark.parametrize("again", [None, b"another", b"a longer one"])
def test_a_removal_whose_answer_was_lost_is_not_sent_again_blindly(time: Time, again: bytes | None) -> None:
    inner = FaultyStore(IgnoringStore(), {1}, after=True, operations={"remove"})
    inner.inner.put("key", [b"old"])

    def make_again(_: StoreRetried) -> None:
        if again is not None:
            inner.inner.put("key", [again])

    store = retrying(inner, time, on_retry=make_again)
    if again is None:
        store.remove("key", Version(b"old", ""))
        assert inner.inner.head("key") is None
    else:
        with pytest.raises(ObjectChangedError) as caught:
            store.remove("key", Version(b"old", ""))
        assert caught.value.unanswered
        assert inner.inner.get("key", max_bytes=100) == again
    assert len(inner.calls) == 1


def test_a_removal_that_did_not_arrive_is_sent_again(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), {1, 2}, operations={"remove"})
    inner.inner.put("key", [b"old"])
    retrying(inner, time).remove("key", Version(b"old", ""))
    assert len(inner.calls) == 3
    assert inner.inner.head("key") is None


def retrying_on(errand: Errand, inner: FaultyStore, time: Time) -> RetryingStore:
    """Under a clock that moves while the errand waits."""
    errand.sleep = time.sleep  # type: ignore[method-assign]
    return retrying(inner, time).on(errand)


def test_requests_of_an_errand_have_no_deadline_of_their_own(time: Time) -> None:
    store = retrying_on(Errand(), FaultyStore(MemoryStore(), range(1, 200)), time)
    store.put("key", [b"x"])
    assert time.now_s > 1000 + 2 * 600


def test_an_errand_that_is_given_up_ends_the_wait_and_sends_nothing_more(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS, error=lambda: TransientStoreError("SlowDown"))
    errand = Errand(retried=lambda event: errand.give_up() if event.tries == 3 else None)
    store = retrying_on(errand, inner, time)
    with pytest.raises(DeadlineExceededError, match="3 tries; the last said: SlowDown") as caught:
        store.put("key", [b"x"])
    assert caught.value.unanswered
    assert len(inner.calls) == 3
    with pytest.raises(DeadlineExceededError, match="not sent") as caught:
        store.put("another", [b"x"])
    assert not caught.value.unanswered, "it never left this host"
    assert len(inner.calls) == 3


def test_an_errand_hears_when_its_requests_begin_to_fail_and_when_none_does(time: Time) -> None:
    told: list[object] = []
    errand = Errand(
        failing=lambda sent_s: told.append(("failing", sent_s)),
        eased=lambda: told.append("eased"),
        acknowledged=lambda: told.append("acknowledged"),
        retried=lambda event: told.append(event.operation),
    )
    store = retrying_on(errand, FaultyStore(MemoryStore(), {1, 2, 4}), time)
    store.put("key", [b"x"])
    store.head("key")
    upload = store.start_upload("other")
    upload.write(1, 0, [b"x"])
    upload.complete()
    assert told == [
        *(("failing", 1000.0), "put", "put", "eased", "acknowledged"),
        *(("failing", time.now_s - time.slept[-1]), "head", "eased", "acknowledged", "acknowledged"),
    ]


def test_what_an_errand_left_half_done_is_taken_back_within_one_minute_in_all(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS, operations={"abort"})
    errand = Errand(clock=time.clock)
    store = retrying_on(errand, inner, time)
    uploads = [store.start_upload(name) for name in "abc"]
    errand.give_up()
    for upload in uploads:
        upload.abort()
    assert len(inner.calls) > 3, "it is tried although the errand is given up"
    assert time.now_s <= 1000 + 60


def test_an_errand_within_a_time_is_given_up_at_its_end(time: Time) -> None:
    inner = FaultyStore(MemoryStore(), ALWAYS)
    store = retrying_on(within(60, clock=time.clock), inner, time)
    with pytest.raises(DeadlineExceededError):
        store.head("key")
    assert 1060 <= time.now_s <= 1061
