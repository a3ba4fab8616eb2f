"""Damage is what stays the same: what a reader concludes from readings that cannot be right."""

from random import Random

import pytest

from asyncckpt import errors
from asyncckpt.checkpoints.rereading import mismatch, read_range, reread_range
from asyncckpt.format.digest import digest
from asyncckpt.store.base import Entry, Patience
from asyncckpt.store.memory import MemoryStore
from tests.unreliable import BadPath, FakeTime

KEY = "step-0000000001/aaaaaaaa-000001/model.safetensors"
RECORD = "step-0000000001.json"
DATA = bytes(range(256)) * 4
OFFSET, SIZE = 100, 200
GOOD = DATA[OFFSET : OFFSET + SIZE]


def stored():
    store = MemoryStore()
    store.put(RECORD, [b"a record"])
    store.put(KEY, [DATA])
    return store


def check(data):
    if digest(data) != digest(GOOD):
        raise mismatch("these bytes", digest(data), digest(GOOD).hex())
    return bytes(data)


def read(path, key=KEY, **options):
    return read_range(path, key, OFFSET, memoryview(bytearray(SIZE)), check, **options)


def flip(data, bit=0):
    data[bit // 8] ^= 1 << bit % 8


def test_a_reading_that_is_right_at_once_is_the_only_one():
    path = BadPath(stored())
    assert read(path) == GOOD
    assert path.used == [0]
    assert not path.time.naps
    assert sum(path.gets.values()) == 1


def test_a_bit_that_flipped_on_the_way_is_read_again_over_another_connection_and_only_its_range():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: number == 1 and flip(data))
    assert read(path) == GOOD
    assert path.used == [0, 1]
    assert path.time.now_s == pytest.approx(0.1)
    assert path.read_bytes == 2 * SIZE


def test_the_same_wrong_bytes_at_eight_readings_within_nine_seconds_are_damage():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data))
    with pytest.raises(errors.DigestMismatchError) as caught:
        read(path)
    assert path.used == [0, 1, 2, 3, 4, 5, 6, 7]
    assert path.time.now_s == pytest.approx(9)
    assert caught.value.key == KEY
    wrong = bytearray(GOOD)
    flip(wrong)
    for fact in ("bytes 100 to 300", digest(GOOD).hex()[:16], digest(wrong).hex()[:16]):
        assert fact in str(caught.value)


def test_a_store_full_of_damage_costs_a_minute_of_waits_and_never_fewer_readings():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data))
    for _ in range(100):
        with pytest.raises(errors.DigestMismatchError):
            read(path)
    assert path.time.now_s == pytest.approx(63)  # the seventh piece of damage ends beyond the minute
    assert sum(path.gets.values()) == 800


def test_the_same_wrong_bytes_from_one_connection_alone_are_no_damage():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: connection == 0 and flip(data))
    assert read(path) == GOOD
    assert path.used == [0, 1]


def test_what_most_readings_agree_on_is_damage_whatever_else_one_of_them_got():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data, 9 if number == 2 else 0))
    with pytest.raises(errors.DigestMismatchError):
        read(path)
    assert len(path.used) == 8


def test_bytes_that_are_wrong_in_another_way_each_time_are_a_bad_path_and_never_damage():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data, number), deadline_s=60)
    with pytest.raises(errors.StoreError, match="bytes change on the way") as caught:
        read(path)
    assert not isinstance(caught.value, errors.CorruptCheckpointError)
    assert 50 < path.time.now_s < 60
    assert len(path.used) > 10
    assert isinstance(caught.value.__cause__, errors.DigestMismatchError)


def test_a_bad_path_that_hits_the_same_few_bits_again_and_again_is_still_no_damage():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data, number % 3), deadline_s=100)
    with pytest.raises(errors.StoreError, match="in 3 ways"):
        read(path)


def test_a_bad_path_that_lets_one_reading_through_before_the_deadline_gives_it():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: number < 9 and flip(data, number))
    assert read(path) == GOOD


@pytest.mark.parametrize("deadline_s", [0.0, 5.0])
def test_a_short_deadline_still_allows_the_readings_that_tell_damage_from_a_bad_path(deadline_s):
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data, number), deadline_s=deadline_s)
    with pytest.raises(errors.StoreError, match="bytes change"):
        read(path)
    assert len(path.used) == 8


def test_a_path_that_spoils_the_same_bit_in_three_of_ten_answers_is_no_damage():
    random = Random(1)
    for _ in range(1000):
        path = BadPath(stored(), spoil=lambda key, data, number, connection: random.random() < 0.3 and flip(data))
        assert read(path) == GOOD


def test_a_range_that_was_read_with_others_counts_as_the_first_reading():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data))
    wrong = bytearray(GOOD)
    flip(wrong)
    first = errors.DigestMismatchError("differ")
    with pytest.raises(errors.DigestMismatchError):
        reread_range(path, KEY, OFFSET, memoryview(wrong), check, error=first)
    assert path.used == [1, 2, 3, 4, 5, 6, 7]


def test_one_404_is_nothing():
    path = BadPath(stored(), hide=lambda key, number, connection: number == 1)
    assert read(path) == GOOD
    assert path.used == [0, 1]


def test_404s_for_five_seconds_are_nothing_whatever_LIST_says():
    path = BadPath(stored(), unlisted=(KEY,))
    path.hide = lambda key, number, connection: path.time.now_s < 5
    assert read(path) == GOOD


def test_an_object_that_LIST_does_not_show_either_is_missing_after_nine_seconds():
    store = stored()
    store.delete([KEY])
    store.put(KEY.replace("model", "other"), [b"x"])
    path = BadPath(store)
    with pytest.raises(errors.MissingShardError) as caught:
        read(path)
    assert caught.value.key == KEY
    assert path.time.now_s == pytest.approx(9)
    assert len(path.used) == 8


def test_an_object_that_LIST_shows_is_never_missing():
    path = BadPath(stored(), hide=lambda key, number, connection: True)
    with pytest.raises(errors.StoreError, match="contradicts itself") as caught:
        read(path)
    assert not isinstance(caught.value, errors.CorruptCheckpointError)
    assert path.time.now_s > 50


def test_nobody_waits_for_an_object_of_a_checkpoint_that_was_removed_whole():
    store = stored()
    store.delete([RECORD, KEY])
    path = BadPath(store)
    with pytest.raises(errors.MissingShardError):
        read(path)
    assert not path.time.naps


def test_an_object_that_is_too_short_is_damage_where_HEAD_and_LIST_agree():
    store = stored()
    store.put(KEY, [DATA[: OFFSET + SIZE - 1]])
    path = BadPath(store)
    with pytest.raises(errors.CorruptCheckpointError, match="ends before"):
        read(path)
    assert len(path.used) == 8
    assert path.gets["head"] == path.gets["list"] == 1


def test_an_object_that_only_GET_finds_too_short_is_no_damage():
    class Short(BadPath):
        def read(self, key, connection, call):
            super().read(key, connection, call)
            raise errors.CorruptCheckpointError("the object is shorter")

    path = Short(stored())
    with pytest.raises(errors.StoreError, match="contradicts itself"):
        read(path)


def test_an_object_whose_size_LIST_tells_otherwise_is_no_damage():
    class Behind(BadPath):
        def list(self, prefix="", **options):
            return (Entry(entry.key, len(DATA)) for entry in super().list(prefix, **options))

    store = stored()
    store.put(KEY, [DATA[:50]])
    with pytest.raises(errors.StoreError, match="contradicts itself"):
        read(Behind(store))


def test_who_was_stopped_neither_waits_nor_reads_on():
    path = BadPath(stored(), spoil=lambda key, data, number, connection: flip(data, number))
    with pytest.raises(errors.DigestMismatchError):
        read(path, stopped=lambda: path.time.now_s > 2)
    assert path.time.now_s < 2.5


def test_a_failing_store_is_told_as_it_is():
    class Failing(BadPath):
        def read(self, key, connection, call):
            if connection:
                raise errors.DeadlineExceededError("no answer", key=key)
            return super().read(key, connection, call)

    path = Failing(stored(), spoil=lambda key, data, number, connection: flip(data))
    with pytest.raises(errors.DeadlineExceededError):
        read(path)


def test_patience_comes_from_the_policy_of_the_store_that_retries():
    from asyncckpt.options import RetryPolicy
    from asyncckpt.store.retry import RetryingStore

    time = FakeTime()
    inner = BadPath(stored(), time=FakeTime())
    store = RetryingStore(inner, RetryPolicy(deadline_s=77), clock=time.clock, sleep=time.sleep)
    assert store.patience == Patience(deadline_s=77, clock=time.clock, sleep=time.sleep)
    inner.spoil = lambda key, data, number, connection: connection == 0 and flip(data)
    assert read(store) == GOOD
    assert inner.used == [0, 1]
    assert RetryingStore(stored()).patience.deadline_s == 0, "nothing lies before a store in this process's memory"
