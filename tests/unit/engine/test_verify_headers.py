"""What `verify` holds a shard's header against: all of the index for the record's own shards, the named ranges for others."""

import pytest

from asyncckpt import errors
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.engine.verify import verify_objects
from asyncckpt.format import keys
from asyncckpt.format.index import Index
from asyncckpt.store.local import LocalStore
from tests.golden.by_hand import ATTEMPTS, EARLIER, write_boxes
from tests.golden.golden import STEP

OWN = keys.folder(STEP, ATTEMPTS[STEP])


@pytest.fixture(params=["none", "zstd"])
def stored(request, tmp_path) -> tuple[LocalStore, Index]:
    write_boxes(tmp_path, request.param)
    store = LocalStore(tmp_path)
    return store, read_checkpoint(store, STEP)[1]


def renamed(index: Index, path: str) -> Index:
    index.tensors[path] = index.tensors[path]._replace(name="other")
    return index


def test_an_earlier_steps_shard_may_hold_more_than_is_named_and_under_other_names(stored):
    store, index = stored
    verify_objects(store, index, OWN)
    verify_objects(store, renamed(index, "model/kept"), OWN)


def test_an_earlier_steps_shard_describes_every_range_that_is_named(stored):
    store, index = stored
    tensor = index.tensors["model/kept"]
    chunk = tensor.chunks[0]
    index.tensors["model/kept"] = tensor._replace(chunks=(chunk._replace(raw_offset=chunk.raw_offset - 2),))
    with pytest.raises(errors.CorruptCheckpointError, match="header and the index differ") as caught:
        verify_objects(store, index, OWN)
    assert caught.value.key.startswith(keys.folder(EARLIER, ATTEMPTS[EARLIER]))


def test_a_shard_of_its_own_holds_what_the_index_names_and_nothing_else(stored):
    store, index = stored
    with pytest.raises(errors.CorruptCheckpointError, match="header and the index differ"):
        verify_objects(store, index, keys.folder(EARLIER, ATTEMPTS[EARLIER]))
    with pytest.raises(errors.CorruptCheckpointError, match="header and the index differ"):
        verify_objects(store, renamed(index, "model/scalar"), OWN)


def test_a_header_beyond_a_limit_is_newer_and_no_damage(stored, monkeypatch):
    store, index = stored
    monkeypatch.setattr("asyncckpt.format.limits.TENSORS", 1)
    with pytest.raises(errors.FormatVersionError, match="of a shard, a safetensors header with 2 tensors"):
        verify_objects(store, index, OWN)


def test_a_headers_frame_that_states_more_than_it_holds_is_damage(stored):
    store, index = stored
    shard = index.shards[0]
    if not len(shard.frames):
        pytest.skip("there are no frames")
    data = bytearray(store.get(shard.key, max_bytes=2**20))
    data[5] ^= 0x80  # of the size that the frame states
    store.put(shard.key, [bytes(data)])
    with pytest.raises(errors.CorruptCheckpointError, match="states"):
        verify_objects(store, index, OWN)
