"""Marks of damage: what they say, and when they count."""

import json

import pytest

from asyncckpt import errors
from asyncckpt.checkpoints.marks import is_marked, mark_damaged, read_mark, unmark
from asyncckpt.engine.catalog import find_checkpoints, read_record
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import hexdigest
from asyncckpt.store.memory import MemoryStore
from tests.faulty import FaultyStore
from tests.records import change_record
from tests.writer import write_checkpoint

MARK = keys.damaged_key(20)
RECORD = keys.record_key(20)


def stored_run(*steps):
    store = MemoryStore()
    for step in steps:
        write_checkpoint(store, step, {"n": step})
    return store


def text_of(store):
    return store.get(MARK, max_bytes=2**20).decode()


def error_of(store, **where):
    return errors.DigestMismatchError("3f12... is stated, 99ab... was read (bytes 5 to 9)", step=20, **where)


def test_a_mark_names_the_attempt_and_tells_people_what_was_wrong_and_when():
    store = stored_run(20)
    attempt = read_record(store, 20).attempt
    assert mark_damaged(store, 20, error_of(store, attempt=attempt, key="step-x/y"), clock=lambda: 1_700_000_000.0)
    lines = text_of(store).splitlines()
    assert lines == [
        attempt,
        "found damaged at 2023-11-14T22:13:20Z",
        "DigestMismatchError: 3f12... is stated, 99ab... was read (bytes 5 to 9) [step 20, key step-x/y]",
    ]
    assert find_checkpoints(store).marked == (20,)


def test_a_mark_holds_nothing_that_names_the_host_or_who_runs_there():
    import getpass
    import socket

    store = stored_run(20)
    mark_damaged(store, 20, error_of(store, attempt=read_record(store, 20).attempt))
    for name in (socket.gethostname(), getpass.getuser(), "/"):
        assert name not in text_of(store)


@pytest.mark.parametrize("content", [b"", b"\n", b"other\n", b"x" * 2**17])
def test_a_mark_that_is_empty_or_names_something_else_or_is_none_of_ours_never_counts(content):
    store = stored_run(10, 20)
    store.put(MARK, [content])
    assert find_checkpoints(store).good == (10, 20)


def test_a_mark_of_another_attempt_does_not_count():
    store = stored_run(20)
    mark_damaged(store, 20)
    change_record(store, 20, attempt="bbbbbbbb-000009")
    assert not is_marked(store, 20)


def test_an_attempt_that_does_not_stand_there_any_more_is_not_marked():
    store = stored_run(20)
    assert not mark_damaged(store, 20, error_of(store, attempt="cccccccc-000001"))
    assert not mark_damaged(store, 30, error_of(store, attempt="cccccccc-000001"))
    assert [entry.key for entry in store.list() if "damaged" in entry.key] == []


@pytest.mark.parametrize("damage", ["flip", "cut", "text", "empty"])
def test_a_record_that_cannot_be_read_is_marked_by_the_digest_of_its_bytes(damage):
    store = stored_run(10, 20)
    good = store.get(RECORD, max_bytes=2**20)
    bad = {"flip": good.replace(b'"step": 20', b'"step": 21'), "cut": good[:-40], "text": b"{", "empty": b""}[damage]
    store.put(RECORD, [bad])
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        read_record(store, 20)
    assert mark_damaged(store, 20, caught.value)
    assert read_mark(store, 20) == hexdigest(bad)
    assert find_checkpoints(store).marked == (20,)
    store.put(RECORD, [good])
    assert find_checkpoints(store).good == (10, 20), "what was misread, or saved anew, does not hide behind an old mark"


def test_a_record_that_reads_well_by_now_is_not_marked():
    store = stored_run(20)
    assert not mark_damaged(store, 20, errors.DigestMismatchError("the record's bytes differ", step=20))
    assert not is_marked(store, 20)


def test_a_record_that_breaks_a_rule_under_the_right_digest_is_marked_by_its_attempt():
    store = stored_run(20)
    change_record(store, 20, index={"key": "../../passwd", "bytes": 5, "digest": "0" * 64})
    with pytest.raises(errors.UnsafeCheckpointError) as caught:
        read_record(store, 20)
    assert mark_damaged(store, 20, caught.value)
    assert read_mark(store, 20) == json.loads(store.get(RECORD, max_bytes=2**20))["attempt"]


def test_a_record_above_the_limit_is_marked_without_being_read_whole(monkeypatch):
    monkeypatch.setattr(limits, "RECORD_BYTES", 1000)
    store = stored_run(20)
    store.put(RECORD, [store.get(RECORD, max_bytes=2**20) + b" " * 1000])
    with pytest.raises(errors.RecordError) as caught:
        read_record(store, 20)
    assert mark_damaged(store, 20, caught.value)
    assert is_marked(store, 20)


def test_unmark_takes_a_mark_away_and_is_content_without_one():
    store = stored_run(20)
    mark_damaged(store, 20)
    unmark(store, 20)
    unmark(store, 20)
    assert find_checkpoints(store).good == (20,)


def test_a_listing_without_marks_is_one_request_and_a_mark_costs_two_small_reads():
    store = stored_run(10, 20)
    counted = FaultyStore(store, operations={"get", "head", "get_into"})
    find_checkpoints(counted)
    assert counted.calls == []
    mark_damaged(store, 20)
    find_checkpoints(counted)
    assert counted.calls == [("get", MARK), ("get", RECORD)]
