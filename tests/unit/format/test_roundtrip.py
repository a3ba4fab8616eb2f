"""Random structures: plan, encode, store, index, decode, equal."""

from itertools import pairwise

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CheckpointError, DigestMismatchError
from asyncckpt.format import keys
from asyncckpt.format.digest import digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import compress, decompress, encode_shard
from asyncckpt.format.index import BlockFinder, Index
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.format.planes import SPARE_BYTES, merge, split
from asyncckpt.format.shard import parse_header
from tests.unit.format.checkpoints import MIXED, load, store, structure_of

CODECS = ["planes", "zstd", "none"]
NAME = st.text(st.characters(exclude_categories=["Cs"]), max_size=8) | st.sampled_from(
    ["__metadata__", "", "#1", "a/b"]
)
SMALL = st.lists(st.integers(0, 5), max_size=4).map(tuple)
LARGE = SMALL | st.tuples(st.integers(1000, 90_000))
LAYOUT = st.one_of(
    st.tuples(st.just(SMALL), st.sampled_from([1, 100])),
    st.tuples(st.just(LARGE), st.sampled_from([None, 20_000, 200_000])),
)


@st.composite
def states(draw):
    """Groups of tensors, and a size of shards that cuts some of them."""
    shape, shard_bytes = draw(LAYOUT)
    tensors = st.dictionaries(NAME.map(keys.escape), st.tuples(st.sampled_from(sorted(DTYPES)), shape), max_size=6)
    return draw(st.dictionaries(st.none() | NAME | st.integers(-(2**63), 2**63 - 1), tensors, max_size=3)), shard_bytes


def check(stored):
    index = stored.parsed
    for number, value in enumerate(stored.values):
        path = stored.plan.structure.path(number)
        assert load(index, stored.objects, path) == value
        tensor = index.tensors[path]
        spec = stored.plan.structure.tensors[number]
        assert (tensor.group, tensor.name, tensor.dtype, tensor.shape) == (
            spec.group,
            spec.name,
            spec.dtype,
            spec.shape,
        )
        assert tensor.raw_bytes == len(value)
    assert index.raw_bytes == stored.plan.data_bytes


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
@given(state=states(), codec=st.sampled_from(CODECS))
def test_any_structure_comes_back_bit_exact(state, codec):
    groups, shard_bytes = state
    stored = store(structure_of(groups), codec, shard_bytes)
    check(stored)
    assert {group.key: group for group in stored.parsed.groups} == {
        group.key: group for group in stored.plan.structure.groups
    }


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("shard_bytes", [None, 300_000, 3000])
def test_a_mixed_state_comes_back_bit_exact(codec, shard_bytes):
    check(store(structure_of(MIXED), codec, shard_bytes))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
@pytest.mark.parametrize("excess", [-1, 0, 1, 100_003])
def test_blocks_end_where_they_should(dtype, excess):
    count = 4 * 2**20 // DTYPES[dtype].element_bytes + excess
    check(store(structure_of({"m": {"w": (dtype, (count,)), "v": (dtype, (3,))}}), "planes"))


def test_aliases_and_the_tree_come_back():
    tree = {"dict": {"m": {"dict": {"w": "tensor", "é": {"list": ["value", "tensor"]}}}}}
    stored = store(structure_of({"m": {"w": ("float32", (3,))}}, aliases=[(0, "tied", 0)], tree=tree))
    index = stored.parsed
    assert index.aliases == {"m/tied": "m/w"}
    assert load(index, stored.objects, "m/tied") == stored.values[0]
    assert index.tree == tree


@pytest.mark.parametrize("codec", CODECS)
def test_without_a_digest_table_the_bytes_are_the_same(codec):
    stored = store(structure_of(MIXED), codec)
    layout = stored.plan
    arena = memoryview(bytearray(b"\xa5" * layout.arena_bytes))
    for offset, value in zip(layout.tensor_offsets, stored.values, strict=True):
        arena[offset : offset + len(value)] = value
    before = bytes(arena)
    for shard in layout.shards:
        frames = [bytes(frame.data) for frame in encode_shard(shard, arena, layout.codec, None)]
        assert b"".join(frames) == stored.objects["step-0000000007/0a1b2c3d-1/" + shard.name]
    assert before == arena


def test_the_digest_table_holds_every_piece():
    stored = store(structure_of(MIXED), shard_bytes=300_000)
    index = stored.parsed
    seen = 0
    for number, value in enumerate(stored.values):
        start = 0
        for chunk in index.tensors[stored.plan.structure.path(number)].chunks:
            pieces = range(start, start + chunk.raw_bytes, BLOCK_BYTES) or [start]
            end = start + chunk.raw_bytes
            assert chunk.digests == b"".join(digest(value[at : min(at + BLOCK_BYTES, end)]) for at in pieces)
            assert [chunk.digest(number) for number in range(len(pieces))] == [
                chunk.digests[at : at + 32] for at in range(0, len(chunk.digests), 32)
            ]
            start = end
            seen += len(pieces)
    assert seen == stored.plan.piece_count


def test_codec_none_borrows_large_tensors_from_the_arena():
    structure = structure_of({"m": {"w": ("uint8", (100_000,)), "a": ("uint8", (10,)), "b": ("uint8", (10,))}})
    stored = store(structure, "none")
    (shard,) = stored.plan.shards
    arena = memoryview(bytearray(stored.plan.arena_bytes))
    _, large, small = encode_shard(shard, arena, "none", None)
    assert isinstance(large.data, memoryview)
    assert large.data.obj is arena.obj
    assert (small.raw_bytes, bytes(small.data)) == (20, bytes(20))
    assert len(stored.parsed.shards[0].frames) == 0


@pytest.mark.parametrize("codec", CODECS)
def test_every_piece_of_a_chunk_has_one_block(codec):
    stored = store(
        structure_of({"m": {"w": ("float32", (2**21 + 9,)), "v": ("int8", (70_000,)), "x": ("int8", (9,))}}), codec
    )
    index = stored.parsed
    blocks = {
        path: BlockFinder(index.shards[0]).blocks(tensor, tensor.chunks[0]) for path, tensor in index.tensors.items()
    }
    assert [block.raw_bytes for block in blocks["m/w"]] == [BLOCK_BYTES, BLOCK_BYTES, 36]
    assert [block.raw_bytes for block in blocks["m/v"]] == [70_000]
    assert len(blocks["m/x"]) == 1
    rows = sorted({(b.stored_offset, b.stored_bytes) for found in blocks.values() for b in found})
    assert all(start + size == after for (start, size), (after, _) in pairwise(rows))
    assert rows[-1][0] + rows[-1][1] == index.shards[0].stored_bytes


@pytest.mark.parametrize("element_bytes", [2, 4, 8])
@pytest.mark.parametrize("count", [0, 1, 65_536, 70_001])
def test_planes_are_split_and_merged(element_bytes, count):
    import numpy as np

    plain = np.random.default_rng(1).integers(0, 256, count * element_bytes, np.uint8)
    planes, back = np.empty_like(plain), np.empty_like(plain)
    spare = np.empty(SPARE_BYTES, np.uint8)
    split(plain, element_bytes, planes, spare)
    assert (planes.reshape(element_bytes, count) == plain.reshape(count, element_bytes).T).all()
    merge(planes, element_bytes, back, spare)
    assert (back == plain).all()
    unaligned = np.empty(len(plain) + 1, np.uint8)[1:]
    merge(planes, element_bytes, unaligned, spare)
    assert (unaligned == plain).all()


@pytest.mark.parametrize("codec", CODECS)
def test_a_flipped_bit_of_a_shard_is_noticed_or_changes_nothing_that_is_read(codec):
    structure = structure_of({"m": {"w": ("bfloat16", (40_000,)), "i": ("int64", (40,)), "b": ("float32", ())}})
    stored = store(structure, codec)
    ((key, data),) = stored.objects.items()
    index = stored.parsed
    unnoticed = []
    for position in range(0, len(data), 16):
        data[position] ^= 1 << position // 16 % 8
        try:
            values = read_all(index, {key: data})
        except CheckpointError:
            continue
        finally:
            data[position] ^= 1 << position // 16 % 8
        assert values == stored.values
        unnoticed.append(position)
    assert len(unnoticed) <= 4  # bits that zstd's decoder ignores, such as the unused one of a frame's header
    assert read_all(index, stored.objects) == stored.values


def test_a_flipped_bit_of_an_index_is_noticed_by_its_digest_and_never_crashes_the_parser():
    stored = store(structure_of({"m": {"w": ("bfloat16", (40_000,)), "i": ("int64", (40,))}}))
    data = bytearray(decompress(stored.index, 10**6))
    refused = 0
    for position in range(len(data)):
        data[position] ^= 1 << position % 8
        assert digest(compress(bytes(data))) != digest(stored.index)
        try:
            Index.parse(bytes(data))
        except CheckpointError:
            refused += 1
        data[position] ^= 1 << position % 8
    assert refused > len(data) // 4


def read_all(index, objects):
    """Everything a shard holds, in the order of the index."""
    (shard,) = index.shards
    if len(shard.frames):
        header = decompress(objects[shard.key][: shard.frames.stored[1]], int(shard.frames.raw[1]))
    else:
        first = min(chunk.raw_offset for tensor in index.tensors.values() for chunk in tensor.chunks)
        header = bytes(objects[shard.key][:first])
    if digest(header) != shard.header_digest:
        raise DigestMismatchError("not the header that was stored")
    parse_header(header, shard.raw_bytes)
    return [load(index, objects, path) for path in index.tensors]
