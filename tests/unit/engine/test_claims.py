"""What an index claims costs no memory until bytes arrive that are right."""

import errno
import json
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import errors
from asyncckpt.engine.catalog import read_checkpoint
from asyncckpt.engine.fetch import fetch
from asyncckpt.engine.verify import verify_objects
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.frames import compress, decompress
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.format.shard import build_header, header_entry
from asyncckpt.store.memory import MemoryStore
from tests.records import change_record
from tests.unit.engine.test_fetch import CODECS, mixed_state, written
from tests.unit.engine.test_fetch_memory import resident_bytes
from tests.writer import write_checkpoint

STEP = 20
GIB = 2**30
ZERO = hexdigest(bytes(BLOCK_BYTES))


def zeros(size_bytes, *, digits=ZERO, header=b"", missing=0):
    """A checkpoint of one tensor of zeros, written block by block; its last blocks may be `missing` in the object."""
    store = MemoryStore()
    folder = write_checkpoint(store, STEP, {"w": torch.zeros(8, dtype=torch.uint8)}, codec="zstd")
    record, _ = read_checkpoint(store, STEP)
    index = json.loads(decompress(store.get(record.index.key, max_bytes=2**20), 2**20))
    (shard,) = index["shards"]
    count = size_bytes // BLOCK_BYTES
    header = header or build_header([(header_entry("w", "U8", (size_bytes,)), size_bytes)])
    head, block = compress(header), compress(bytes(BLOCK_BYTES))
    store.put(shard["key"], [head, *[block] * (count - missing)])
    shard["frames"] = [[len(header), len(head)], *[[BLOCK_BYTES, len(block)]] * count]
    shard["raw_bytes"], shard["stored_bytes"] = (sum(frame[at] for frame in shard["frames"]) for at in (0, 1))
    shard["header"] = hexdigest(header)
    row = [[0], [size_bytes], 0, len(header), digits * count]
    index["tensors"] = [[0, "w", "uint8", [size_bytes], "plain", [row]]]
    stored = compress(json.dumps(index).encode())
    store.put(record.index.key, [stored])
    change_record(store, STEP, index={"key": record.index.key, "bytes": len(stored), "digest": hexdigest(stored)})
    return store, folder


def peak_of(act):
    """Bytes that became resident meanwhile, at most."""
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    act()
    return resident_bytes("VmHWM") - before


def test_a_gibibyte_of_zeros_that_is_stored_in_little_is_restored():
    store, _ = zeros(GIB)
    assert sum(entry.stored_bytes for entry in store.list()) < 2**18
    loaded = asyncckpt.load("memory://zeros", store=store)["w"]
    assert loaded.shape == (GIB,)
    assert not loaded.view(torch.int64).any()


@pytest.mark.parametrize("size_bytes", [GIB, 2 * GIB])
@pytest.mark.parametrize("threads", [1, 32])
def test_blocks_that_are_wrong_take_no_memory_one_after_the_other(size_bytes, threads):
    store, _ = zeros(size_bytes, digits="00" * 32)
    _, index = read_checkpoint(store, STEP)

    def act():
        with pytest.raises(errors.DigestMismatchError):
            fetch(store, index, ["w"], threads=threads)

    assert peak_of(act) < 64 * 2**20


def test_an_object_that_is_shorter_than_its_claims_is_refused_before_the_claims_take_memory():
    store, _ = zeros(2 * GIB, missing=500)
    _, index = read_checkpoint(store, STEP)

    def act():
        with pytest.raises(errors.CorruptCheckpointError):
            fetch(store, index, ["w"], threads=2)

    assert peak_of(act) < 64 * 2**20


def refused_memory(size_bytes):
    raise OSError(errno.ENOMEM, "Cannot allocate memory")


def test_where_memory_is_refused_the_objects_are_asked_for_their_sizes():
    store, _ = zeros(2 * GIB, missing=1)
    _, index = read_checkpoint(store, STEP)
    with pytest.raises(errors.CorruptCheckpointError, match="the index states"):
        fetch(store, index, ["w"], into=refused_memory)


@pytest.mark.parametrize("codec", CODECS)
def test_a_machine_with_too_little_memory_finds_no_damage(codec):
    store, expected, index = written(mixed_state(), codec=codec)
    with pytest.raises(errors.CheckpointError, match="refuses memory for") as caught:
        fetch(store, index, expected, into=refused_memory)
    assert type(caught.value) is errors.CheckpointError


def test_a_header_that_swells_is_digested_before_it_is_held():
    true = build_header([(header_entry("w", "U8", (BLOCK_BYTES,)), BLOCK_BYTES)])
    header = true + b" " * (99_999_000 - len(true))
    store, folder = zeros(BLOCK_BYTES, header=header)
    record, index = read_checkpoint(store, STEP)
    wrong = json.loads(decompress(store.get(record.index.key, max_bytes=2**20), 2**20))
    wrong["shards"][0]["header"] = "00" * 32
    stored = compress(json.dumps(wrong).encode())
    store.put(record.index.key, [stored])
    change_record(store, STEP, index={"key": record.index.key, "bytes": len(stored), "digest": hexdigest(stored)})
    _, index = read_checkpoint(store, STEP)

    def act():
        with pytest.raises(errors.DigestMismatchError, match="header"):
            verify_objects(store, index, folder)

    assert peak_of(act) < 64 * 2**20
