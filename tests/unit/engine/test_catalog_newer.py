"""An index of a later version, with right digests: an older reader says so, and never calls it damage."""

import json

import pytest
import torch

from asyncckpt import errors
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.format import keys
from asyncckpt.format.digest import digest
from asyncckpt.format.frames import compress, decompress
from asyncckpt.store.memory import MemoryStore
from tests.records import change_record, fields_of
from tests.writer import write_checkpoint

STEP = 7


def change_index(store, change) -> None:
    """Put the index again as another writer might have written it, with the right digest in the record."""
    ref = fields_of(store.get(keys.record_key(STEP), max_bytes=2**20))["index"]
    index = json.loads(decompress(store.get(ref["key"], max_bytes=2**20), 2**20))
    change(index)
    data = compress(json.dumps(index).encode())
    store.put(ref["key"], [data])
    change_record(store, STEP, index={"key": ref["key"], "bytes": len(data), "digest": digest(data).hex()})


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.update(format=2),
        lambda index: index.update(codec="delta"),
        lambda index: index["tree"].update(dict={"t": "handle"}),
        lambda index: index["tensors"][0].__setitem__(2, "float6"),
        lambda index: index["tensors"][0].__setitem__(4, "delta"),
        lambda index: index.update(padding=" " * 2**23),
    ],
)
def test_what_is_unknown_or_too_large_is_newer_and_no_damage(change):
    store = MemoryStore()
    write_checkpoint(store, STEP, {"t": torch.ones(3)})
    change_index(store, change)
    with pytest.raises(errors.FormatVersionError, match="newer asyncckpt") as caught:
        read_checkpoint(store, STEP)
    assert caught.value.step == STEP
    assert not isinstance(caught.value, errors.CorruptCheckpointError | errors.UnsafeCheckpointError)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index["tensors"][0].pop(),
        lambda index: index["tensors"][0][5][0].__setitem__(3, 10**6),
        lambda index: index["tensors"][0][5][0].__setitem__(1, [2]),
        lambda index: index["shards"][0].update(stored_bytes=1),
    ],
)
def test_a_broken_rule_is_damage_though_digests_agree(change):
    store = MemoryStore()
    write_checkpoint(store, STEP, {"t": torch.ones(3)})
    change_index(store, change)
    with pytest.raises(errors.RecordError):
        read_checkpoint(store, STEP)


def test_fields_that_a_reader_does_not_know_are_ignored():
    store = MemoryStore()
    write_checkpoint(store, STEP, {"t": torch.ones(3)})
    before = read_checkpoint(store, STEP)[1]
    change_index(store, lambda index: index.update(later={"a": 1}))
    assert read_checkpoint(store, STEP)[1] == before
