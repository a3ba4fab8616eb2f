"""The zstd reader against what a hostile or broken store may serve."""

import threading
import tracemalloc

import numpy as np
import pytest
import zstandard

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError
from asyncckpt.format.frames import compress, decode_block, decode_frame, decompress, encode_shard
from tests.unit.format.checkpoints import MIXED, load, store, structure_of

DATA = np.random.default_rng(0).integers(0, 9, 300_000, np.uint8).tobytes()


def decoded(frame, size):
    out = bytearray(size)
    decode_frame(frame, memoryview(out))
    return bytes(out)


@pytest.mark.parametrize("data", [b"", b"x", DATA, bytes(2**20)])
@pytest.mark.parametrize("level", [-5, 1, 19])
@pytest.mark.parametrize("checksum", [True, False])
def test_any_writers_frame_that_states_its_size_is_decoded(data, level, checksum):
    frame = zstandard.ZstdCompressor(level=level, write_checksum=checksum).compress(data)
    assert decoded(frame, len(data)) == data
    assert decoded(bytearray(frame), len(data)) == data
    assert decoded(memoryview(frame), len(data)) == data


@pytest.mark.parametrize("size", [0, len(DATA) - 1, len(DATA) + 1, 10**12])
def test_a_frame_of_another_size_is_refused(size):
    frame = compress(DATA)
    with pytest.raises(CorruptCheckpointError, match="expected"):
        decode_frame(frame, memoryview(bytearray(min(size, 10**6))))


def test_a_frame_cut_short_anywhere_is_refused():
    frame = compress(DATA)
    for length in [*range(30), *range(30, len(frame), 997), len(frame) - 1]:
        with pytest.raises(CorruptCheckpointError):
            decoded(frame[:length], len(DATA))


SKIPPABLE = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"


@pytest.mark.parametrize("tail", [b"\0", b"garbage", compress(b""), compress(b"more"), SKIPPABLE])
def test_anything_behind_a_frame_is_refused(tail):
    with pytest.raises(CorruptCheckpointError, match="length"):
        decoded(compress(DATA) + tail, len(DATA))


@pytest.mark.parametrize("data", [b"", b"\x28\xb5\x2f", b"no frame at all", SKIPPABLE, bytes(100)])
def test_what_is_no_frame_is_refused(data):
    with pytest.raises(CorruptCheckpointError):
        decode_frame(data, memoryview(bytearray(4)))
    with pytest.raises(CorruptCheckpointError):
        decompress(data, 100)


def test_a_frame_that_does_not_state_its_size_is_refused():
    frame = zstandard.ZstdCompressor(write_content_size=False).compress(DATA)
    with pytest.raises(CorruptCheckpointError, match="does not state"):
        decoded(frame, len(DATA))


def test_a_frame_that_needs_a_dictionary_is_refused():
    dictionary = zstandard.ZstdCompressionDict(DATA[:5000])
    frame = zstandard.ZstdCompressor(dict_data=dictionary).compress(DATA)
    parameters = zstandard.get_frame_parameters(frame)
    if parameters.dict_id == 0:  # a raw dictionary has no number: then decoding fails
        with pytest.raises(CorruptCheckpointError):
            decoded(frame, len(DATA))


def test_a_wrong_checksum_is_refused():
    frame = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(DATA))
    frame[-1] ^= 1
    with pytest.raises(CorruptCheckpointError, match="damaged"):
        decoded(frame, len(DATA))


def forged(frame, stated, window=b"\x58"):
    """The same blocks behind a header that states another size (8 bytes) and a window (here 2 MiB)."""
    body = bytes(frame[zstandard.frame_header_size(frame) :])
    return b"\x28\xb5\x2f\xfd" + b"\xc0" + window + stated.to_bytes(8, "little") + body


@pytest.mark.parametrize("stated", [len(DATA) - 1, len(DATA) + 1, 1])
def test_a_frame_whose_blocks_hold_more_or_less_than_it_states_is_refused(stated):
    with pytest.raises(CorruptCheckpointError):
        decoded(forged(compress(DATA), stated), stated)


def test_a_bomb_takes_no_memory():
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(64 * 2**20))
    assert len(bomb) < 10_000
    tracemalloc.start()
    try:
        for frame in (bomb, forged(compress(DATA), 2**60)):
            with pytest.raises(ResourceLimitError, match="limit"):
                decompress(frame, 10**6)
            with pytest.raises(CorruptCheckpointError):
                decode_frame(frame, memoryview(bytearray(1000)))
        assert tracemalloc.get_traced_memory()[1] < 2**20
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(("window", "error"), [(b"\xa8", ResourceLimitError), (b"\xf8", CorruptCheckpointError)])
def test_a_huge_window_is_refused(window, error):
    frame = forged(compress(b"abc" * 100), 300, window)  # 2 GiB, and more than zstd knows
    with pytest.raises(error):
        decoded(frame, 300)
    with pytest.raises(error):
        decompress(frame, 300)


@pytest.mark.parametrize(
    ("count", "plane_bytes", "raw_bytes"),
    [(1, 2, 8), (2, 1, 8), (3, 3, 9), (4, 4, 10), (16, 16, 16), (2, 2, 2**23), (0, 1, 8)],
)
def test_a_block_that_cannot_be_is_refused(count, plane_bytes, raw_bytes):
    frames = [compress(bytes(raw_bytes // max(plane_bytes, 1)))] * count
    with pytest.raises(CorruptCheckpointError):
        decode_block(frames, plane_bytes, raw_bytes, memoryview(bytearray(raw_bytes)))


def test_decompress_mirrors_compress():
    assert decompress(compress(DATA), len(DATA)) == DATA
    assert decompress(compress(b""), 0) == b""


def test_threads_encode_and_decode_side_by_side():
    structure = structure_of(MIXED)
    alone = store(structure)
    failures = []

    def work():
        try:
            stored = store(structure)
            assert stored.objects == alone.objects
            for number, value in enumerate(stored.values):
                assert load(stored.parsed, stored.objects, structure.path(number)) == value
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_shards_encoded_in_turns_by_one_thread_do_not_mix():
    structure = structure_of({"a": {"w": ("float32", (90_000,))}, "b": {f"{n}": ("int16", (999,)) for n in range(9)}})
    stored = store(structure)
    layout = stored.plan
    arena = memoryview(bytearray(layout.arena_bytes))
    for offset, value in zip(layout.tensor_offsets, stored.values, strict=True):
        arena[offset : offset + len(value)] = value
    running = [(shard, encode_shard(shard, arena, layout.codec, None), bytearray()) for shard in layout.shards]
    for _ in range(10):
        for _, frames, data in running:
            frame = next(frames, None)
            data += frame.data if frame else b""
    assert [data for _, _, data in running] == list(stored.objects.values())
