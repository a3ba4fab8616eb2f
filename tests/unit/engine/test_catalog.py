"""Records, indexes and state files: damaged, newer, missing, or only misread."""

import pytest
import torch

from asyncckpt import errors
from asyncckpt.engine.catalog import read_index, read_record, read_values
from asyncckpt.format import keys, limits
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.frames import compress, decompress
from asyncckpt.format.record import sealed
from asyncckpt.store.memory import MemoryStore
from tests.records import change_record, fields_of, record_text
from tests.unreliable import BadPath
from tests.writer import write_checkpoint

RECORD = keys.record_key(20)


def stored_run(*steps):
    store = MemoryStore()
    for step in steps or (20,):
        write_checkpoint(store, step, {"n": step})
    return store


def read_all(store):
    record = read_record(store, 20)
    return record, read_index(store, record), read_values(store, record)


def key_of(store, part):
    return next(entry.key for entry in store.list() if part in entry.key)


def flip(data, number=0):
    data[number % len(data)] ^= 1


PARTS = [RECORD, "index", "state.pt"]


def test_what_is_right_at_once_is_read_once():
    path = BadPath(stored_run())
    read_all(path)
    assert path.used == [0, 0, 0]
    assert path.gets["head"] == path.gets["list"] == 0


@pytest.mark.parametrize("part", PARTS)
def test_a_misreading_of_any_object_is_read_again_that_object_alone(part):
    path = BadPath(stored_run(), spoil=lambda key, data, number, connection: part in key and number == 1 and flip(data))
    read_all(path)
    assert len(path.used) == 4
    assert path.readings[key_of(path, part)] == 2


@pytest.mark.parametrize("part", PARTS)
def test_damage_of_any_object_is_what_eight_readings_agree_on(part):
    path = BadPath(stored_run(), spoil=lambda key, data, number, connection: part in key and flip(data))
    with pytest.raises(errors.CorruptCheckpointError) as caught:
        read_all(path)
    assert path.readings[caught.value.key] == 8
    assert (caught.value.step, part in caught.value.key) == (20, True)


@pytest.mark.parametrize("part", PARTS)
def test_an_object_that_changes_from_reading_to_reading_is_no_damage(part):
    path = BadPath(stored_run(), spoil=lambda key, data, number, connection: part in key and flip(data, number))
    with pytest.raises(errors.StoreError, match="bytes change on the way") as caught:
        read_all(path)
    assert caught.value.step == 20
    assert path.time.now_s > 50


@pytest.mark.parametrize("part", PARTS)
def test_one_404_of_any_object_is_nothing(part):
    path = BadPath(stored_run(), hide=lambda key, number, connection: part in key and number == 1)
    assert read_all(path)[0].step == 20


@pytest.mark.parametrize("part", ["index", "state.pt"])
def test_an_object_that_is_gone_for_good_is_missing(part):
    store = stored_run()
    store.delete([key_of(store, part)])
    path = BadPath(store)
    with pytest.raises(errors.MissingShardError) as caught:
        read_all(path)
    assert part in caught.value.key
    assert path.time.now_s == pytest.approx(9)


@pytest.mark.parametrize("part", ["index", "state.pt"])
@pytest.mark.parametrize("change", [lambda data: data[:-1], lambda data: data + b"x", lambda data: b""])
def test_an_object_of_another_size_is_damaged(part, change):
    store = stored_run()
    key = key_of(store, part)
    store.put(key, [change(store.get(key, max_bytes=2**20))])
    with pytest.raises(errors.CorruptCheckpointError, match="file"):
        read_all(BadPath(store))


def test_a_record_that_was_never_there_is_not_found_at_once():
    path = BadPath(stored_run(10))
    with pytest.raises(errors.CheckpointNotFoundError, match="the last that are there: 10"):
        read_record(path, 20)
    assert not path.time.naps


def test_a_record_that_is_removed_after_it_was_listed_is_not_found():
    store = stored_run()
    path = BadPath(store)

    def hide(key, number, connection):
        if number == 3:
            store.delete([RECORD])
        return True

    path.hide = hide
    with pytest.raises(errors.CheckpointNotFoundError, match="was removed"):
        read_record(path, 20)


def test_a_record_of_a_newer_asyncckpt_is_no_damage_and_is_not_read_again():
    store = stored_run()
    change_record(store, 20, requires=["delta"], states="elsewhere")
    path = BadPath(store)
    with pytest.raises(errors.FormatVersionError, match="'delta'") as caught:
        read_record(path, 20)
    assert (caught.value.step, path.used) == (20, [0])


@pytest.fixture
def large_record(monkeypatch):
    """A store whose record is above the limit, with the right digest."""
    monkeypatch.setattr(limits, "RECORD_BYTES", 4000)
    store = stored_run()
    fields = fields_of(store.get(RECORD, max_bytes=2**20)) | {"config": ["x" * 2_500_000]}
    store.put(RECORD, [record_text(fields)])
    return store


def test_a_record_above_the_limit_whose_digest_agrees_is_newer(large_record):
    path = BadPath(large_record)
    with pytest.raises(errors.FormatVersionError, match="above 4000"):
        read_record(path, 20)
    assert not path.time.naps


def test_a_record_above_the_limit_that_is_read_is_held_a_piece_at_a_time(large_record):
    longest = 0

    class Measured(BadPath):
        def get_into(self, key, start, target):
            nonlocal longest
            longest = max(longest, len(target))
            super().get_into(key, start, target)

    with pytest.raises(errors.FormatVersionError):
        read_record(Measured(large_record), 20)
    assert longest == 2**20


@pytest.mark.parametrize("position", [0, 2_000_000, -200])
def test_a_record_above_the_limit_whose_digest_differs_is_damaged(large_record, position):
    data = bytearray(large_record.get(RECORD, max_bytes=2**30))
    data[position] ^= 1
    large_record.put(RECORD, [data])
    with pytest.raises(errors.DigestMismatchError):
        read_record(BadPath(large_record), 20)


def test_a_record_above_the_limit_that_does_not_end_as_a_record_is_damaged_by_its_last_bytes_alone(large_record):
    large_record.put(RECORD, [large_record.get(RECORD, max_bytes=2**30), b" " * 2**20])
    path = BadPath(large_record)
    with pytest.raises(errors.RecordError, match="does not end with its digest"):
        read_record(path, 20)
    assert path.read_bytes == 8 * 82


def test_a_file_beyond_the_limits_under_right_digests_is_newer():
    store = stored_run()
    states = fields_of(store.get(RECORD, max_bytes=2**20))["states"]
    change_record(store, 20, states=[states[0] | {"bytes": limits.STATE_BYTES + 1}])
    with pytest.raises(errors.FormatVersionError):
        read_all(BadPath(store))


def test_a_record_whose_text_is_sealed_and_no_json_is_damaged():
    store = stored_run()
    store.put(RECORD, [sealed(b'{"format" 1\n}')])
    with pytest.raises(errors.RecordError):
        read_record(BadPath(store), 20)


def test_a_shard_outside_of_the_folders_that_the_record_names_is_damage():
    store = MemoryStore()
    write_checkpoint(store, 20, {"w": torch.ones(2)})
    record, _, _ = read_all(store)
    (own,) = record.folders
    other = own.replace("step-0000000020", "step-0000000019")
    text = decompress(store.get(record.index.key, max_bytes=2**20), 2**20)
    stored = compress(text.replace(own.encode(), other.encode()))
    store.put(record.index.key, [stored])
    named = {"key": record.index.key, "bytes": len(stored), "digest": hexdigest(stored)}
    change_record(store, 20, index=named)
    with pytest.raises(errors.RecordError, match="outside of the folders") as caught:
        read_all(store)
    assert caught.value.key == record.index.key
    change_record(store, 20, folders=[other, own])
    read_all(store)
