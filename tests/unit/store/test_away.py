"""Whether a store answers, as its contact sees it. Time is a number here."""

import contextlib
import itertools
import logging
import threading

import pytest

from asyncckpt.errors import (
    DeadlineExceededError,
    ObjectNotFoundError,
    StoreNotFoundError,
    TransientStoreError,
)
from asyncckpt.events import StoreAway, StoreBack
from asyncckpt.options import RetryPolicy, S3Options
from asyncckpt.store import away
from asyncckpt.store.away import Contact, Outage
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.opening import open_store
from asyncckpt.store.retry import RetryingStore
from tests.faulty import FaultyStore
from tests.processes import eventually
from tests.unreliable import FakeTime

_addresses = itertools.count()


class Watched:
    """A store over a faulty one, its contact, and what was told."""

    def __init__(self, fail=(), *, error=lambda: TransientStoreError("down"), policy=None, met=True, **options):
        self.time = FakeTime()
        self.told = []
        self.address = f"test-{next(_addresses)}"
        if met is True:
            away.meet(self.address)
        policy = policy or RetryPolicy(first_wait_s=1, max_wait_s=1)
        self.contact = Contact(
            "s3://bucket/run",
            self.address,
            policy=policy,
            clock=self.time.clock,
            met=met if callable(met) else lambda: None,
            watches=False,
            **{"tell": self.told.append, **options},
        )
        self.inner = FaultyStore(MemoryStore(), fail, error=error)
        self.store = RetryingStore(
            self.inner,
            policy,
            clock=self.time.clock,
            sleep=self.time.sleep,
            uniform=lambda low, high: high,
            contact=self.contact,
        )


def failing(status=0, *, unreached=False):
    def made():
        error = TransientStoreError("no")
        error.status, error.unreached = status, unreached
        return error

    return made


def test_ten_seconds_without_an_answer_are_told_once_a_minute_and_so_is_the_end():
    rig = Watched(range(1, 132))
    rig.store.head("key")
    aways, (back,) = rig.told[:-1], rig.told[-1:]
    assert [round(event.since_s) for event in aways] == [10, 70, 130]
    assert [round(event.left_s) for event in aways] == [590, 530, 470]
    assert {event.error for event in aways} == {"down"}
    assert back == StoreBack(131.0)


def test_a_short_trouble_is_silent():
    rig = Watched(range(1, 10))
    rig.store.head("key")
    assert rig.told == []


@pytest.mark.parametrize(("status", "is_answer"), [(0, False), (503, False), (429, False), (409, True), (400, True)])
def test_what_only_the_store_can_say_is_an_answer(status, is_answer):
    rig = Watched(range(1, 30), error=failing(status))
    rig.store.head("key")
    assert (rig.told == []) == is_answer


def test_one_request_that_is_answered_speaks_for_all():
    rig = Watched()
    rig.contact.asks()
    for _ in range(30):
        rig.time.sleep(1)
        rig.contact.fails(failing()())
        rig.store.head("key")
    assert rig.told == []


def test_a_request_that_hangs_is_told_without_any_failure():
    rig = Watched()
    rig.contact.asks()
    assert rig.contact.look() == 10
    rig.time.sleep(10)
    rig.contact.look()
    assert rig.told == [StoreAway(10.0, "", 0, 590.0)]


def test_a_slow_link_that_moves_bytes_is_not_away_unless_something_failed():
    rig = Watched()
    rig.contact.asks()
    for _ in range(40):
        rig.time.sleep(1)
        rig.contact.moves()
        rig.contact.look()
    assert rig.told == []
    rig.contact.fails(failing(503)())
    assert [event.since_s for event in rig.told] == [40.0]


def test_a_store_that_nobody_asks_is_not_away():
    rig = Watched()
    rig.store.head("key")
    rig.time.sleep(3600)
    rig.contact.look()
    rig.store.head("key")
    assert rig.told == []


def test_an_outage_that_outlasts_a_request_is_one_outage():
    rig = Watched(range(1, 10**6), policy=RetryPolicy(deadline_s=30, first_wait_s=1, max_wait_s=1))
    with pytest.raises(DeadlineExceededError):
        rig.store.head("key")
    rig.time.sleep(100)
    rig.inner.fail = ()
    rig.store.head("key")
    assert [type(event) for event in rig.told] == [StoreAway, StoreBack]
    assert rig.told[-1].after_s == 130


def test_without_a_listener_people_read_it(caplog):
    rig = Watched(range(1, 13), tell=None)
    with caplog.at_level(logging.WARNING, "asyncckpt"):
        rig.store.head("key")
    first, last = (record.getMessage() for record in caplog.records)
    assert first.startswith("cannot reach s3://bucket/run: no answer for 10 s; retrying until ")
    assert first.endswith("reading waits. Last: down")
    assert last == "s3://bucket/run answers again, after 12 s"


def test_a_thread_looks_while_a_request_hangs_and_ends_with_the_store(moto_endpoint):
    told = threading.Event()
    contact = Contact("s3://b", "hangs", policy=RetryPolicy(), tell=lambda _: told.set(), away_s=0.05)
    before = threading.active_count()
    contact.asks()
    assert told.wait(10)
    contact.close()
    assert threading.active_count() == before


def test_a_wrong_address_fails_after_the_time_for_a_first_contact():
    rig = Watched(range(1, 10**6), error=failing(unreached=True), met=False)
    with pytest.raises(
        StoreNotFoundError, match=r"nobody answers there, and nobody ever did.*check the endpoint"
    ) as caught:
        rig.store.head("key")
    assert rig.time.now_s == 15
    assert not caught.value.unanswered
    assert [round(event.left_s) for event in rig.told] == [5]


@pytest.mark.parametrize("error", [failing(503), failing()], ids=["5xx", "timeout"])
def test_a_store_that_is_there_and_fails_at_first_contact_keeps_the_long_deadline(error):
    rig = Watched(range(1, 10**6), error=error, met=False)
    with pytest.raises(DeadlineExceededError):
        rig.store.head("key")
    assert rig.time.now_s == 600


@pytest.mark.parametrize("first", [TransientStoreError, ObjectNotFoundError])
def test_whoever_was_answered_once_takes_a_refusal_for_an_outage(first):
    answer = first("an answer of any kind")
    answer.status = 503 if first is TransientStoreError else 404
    errors = itertools.chain([answer], (failing(unreached=True)() for _ in itertools.count()))
    rig = Watched(range(1, 10**6), error=lambda: next(errors), met=False)
    with contextlib.suppress(ObjectNotFoundError, DeadlineExceededError):
        rig.store.get("key", max_bytes=1)
    if first is ObjectNotFoundError:
        with pytest.raises(DeadlineExceededError):
            rig.store.head("key")
    assert rig.time.now_s == 600


def test_the_first_answer_is_told_once():
    met = []
    rig = Watched({1}, error=failing(unreached=True), met=lambda: met.append(1))
    for _ in range(3):
        rig.store.head("key")
    assert met == [1]


def test_several_contacts_tell_one_story():
    outage = Outage()
    gone = StoreAway(10.0, "down", 1, 590.0)
    assert outage.is_news(gone, 100)
    assert not outage.is_news(gone, 100.4), "the second worker says the same"
    assert outage.is_news(gone, 160)
    assert outage.is_news(StoreBack(70.0), 170)
    assert not outage.is_news(StoreBack(70.0), 170.1)
    outage.answered(200)
    assert not outage.is_news(gone, 204), "another worker has just had an answer"
    assert outage.is_news(gone, 211)


def test_a_refused_connection_is_told_from_one_that_breaks(proxy, s3_bucket):
    quick = RetryPolicy(deadline_s=0.6, first_wait_s=0.05, max_wait_s=0.1, first_contact_s=0.3)
    with (
        open_store(f"s3://{s3_bucket}/x", S3Options(endpoint_url="http://127.0.0.1:9", retry=quick)) as nowhere,
        pytest.raises(StoreNotFoundError, match=r"http://127\.0\.0\.1:9/"),
    ):
        nowhere.head("key")
    proxy.down = True
    with (
        open_store(f"s3://{s3_bucket}/x", S3Options(endpoint_url=proxy.url, retry=quick)) as resets,
        pytest.raises(DeadlineExceededError),
    ):
        resets.head("key")
    eventually(lambda: not [t for t in threading.enumerate() if t.name == "asyncckpt-contact"], "no thread is left")
