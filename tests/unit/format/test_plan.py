import hashlib
import json
import os
import subprocess
import sys
import time
from itertools import pairwise

import pytest

from asyncckpt.errors import UnsupportedTensorError
from asyncckpt.format import plan as plans
from asyncckpt.format.plan import Structure, plan
from asyncckpt.format.shard import parse_header
from tests.unit.format.checkpoints import MIXED, structure_of

MIB = 2**20

FINGERPRINT = """
import hashlib, json, sys
from asyncckpt.format.plan import Structure, plan
made = plan(Structure.from_json(json.load(sys.stdin)), shard_bytes=100_000)
print(hashlib.sha256(repr((made, [shard.blocks for shard in made.shards])).encode()).hexdigest())
"""


def test_two_processes_make_the_same_plan():
    structure = structure_of(MIXED)
    text = json.dumps(structure.to_json())
    made = plan(structure, shard_bytes=100_000)
    here = hashlib.sha256(repr((made, [shard.blocks for shard in made.shards])).encode()).hexdigest()
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-c", FINGERPRINT],
            input=text,
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
            capture_output=True,
            text=True,
            check=True,
        )
        assert done.stdout.strip() == here


def test_a_structure_crosses_as_json():
    structure = structure_of({3: {"a": ("float32", (2, 3))}, None: {"b": ("bool", ())}}, aliases=[(0, "tied", 0)])
    back = Structure.from_json(json.loads(json.dumps(structure.to_json())))
    assert back == structure
    assert type(back.tensors[0].shape) is tuple
    assert back.path(0) == "#3/a"
    assert back.path(1) == "b"


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
@pytest.mark.parametrize("shard_bytes", [None, 300_000, 5000])
def test_every_byte_of_every_tensor_has_one_place(codec, shard_bytes):
    structure = structure_of(MIXED)
    made = plan(structure, codec=codec, shard_bytes=shard_bytes)
    chunks = [chunk for shard in made.shards for chunk in shard.chunks]
    pieces = [chunk.first_piece + piece for chunk in chunks for piece in range(chunk.pieces)]
    assert pieces == list(range(made.piece_count))
    assert sum(chunk.raw_bytes for chunk in chunks) == made.data_bytes
    places = sorted((chunk.arena_offset, chunk.raw_bytes) for chunk in chunks)
    assert all(start + size <= after for (start, size), (after, _) in pairwise(places))
    for tensor, offset in enumerate(made.tensor_offsets):
        assert offset % 64 == 0
        own = [chunk for chunk in chunks if chunk.tensor == tensor]
        assert own[0].arena_offset == offset
        assert all(a.arena_offset + a.raw_bytes == b.arena_offset for a, b in pairwise(own))
    assert made.digests_offset >= max(start + size for start, size in places)
    assert made.arena_bytes >= made.digests_offset + 32 * made.piece_count


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
@pytest.mark.parametrize("shard_bytes", [None, 300_000, 1000])
def test_headers_describe_the_chunks_and_align_them(codec, shard_bytes):
    made = plan(structure_of(MIXED), codec=codec, shard_bytes=shard_bytes)
    for shard in made.shards:
        described = parse_header(shard.header, shard.raw_bytes)
        assert [(one.raw_offset, one.raw_bytes) for one in described.values()] == [
            (chunk.raw_offset, chunk.raw_bytes) for chunk in shard.chunks
        ]
        assert list(described) == [chunk.name for chunk in shard.chunks]
        for chunk in shard.chunks:
            spec = made.structure.tensors[chunk.tensor]
            assert chunk.raw_offset % min(plans.DTYPES[spec.dtype].element_bytes, 8) == 0
            assert spec.group == shard.group


@pytest.mark.parametrize("shard_bytes", [None, 300_000, 1000])
def test_blocks_cover_the_data_in_order(shard_bytes):
    made = plan(structure_of(MIXED), shard_bytes=shard_bytes)
    for shard in made.shards:
        end = len(shard.header)
        for block in shard.blocks:
            assert block.raw_offset == end
            assert 0 < block.raw_bytes <= 4 * MIB
            assert sum(size for _, size in block.pieces) == block.raw_bytes
            assert block.raw_bytes % block.plane_bytes == 0
            end += block.raw_bytes
        assert end == shard.raw_bytes


def test_a_large_chunk_has_blocks_of_its_own():
    tensors = {
        "a": ("uint8", (10,)),
        "large": ("uint8", (9 * MIB,)),
        "b": ("uint8", (65_535,)),
        "c": ("uint8", (65_536,)),
    }
    (shard,) = plan(structure_of({"m": tensors})).shards
    assert [block.raw_bytes for block in shard.blocks] == [10, 4 * MIB, 4 * MIB, MIB, 65_535, 65_536]


def test_small_chunks_share_blocks_and_are_never_split():
    tensors = {f"{number}": ("uint8", (60_000,)) for number in range(150)}
    (shard,) = plan(structure_of({"m": tensors})).shards
    assert [block.raw_bytes for block in shard.blocks] == [69 * 60_000, 69 * 60_000, 12 * 60_000]
    assert [len(block.chunks) for block in shard.blocks] == [69, 69, 12]


def test_pieces_merge_where_tensors_touch():
    tensors = {f"{number}": ("float32", (16,)) for number in range(9)} | {"last": ("float32", (3,))}
    (shard,) = plan(structure_of({"m": tensors})).shards
    assert [block.pieces for block in shard.blocks] == [((0, 9 * 64 + 12),)]


def test_a_large_tensor_is_cut_along_its_first_long_dimension():
    made = plan(structure_of({"m": {"w": ("float32", (1, 10, 100))}, "n": {"b": ("bool", ())}}), shard_bytes=1500)
    assert [shard.name for shard in made.shards] == [
        "m-00001-of-00003.safetensors.zst",
        "m-00002-of-00003.safetensors.zst",
        "m-00003-of-00003.safetensors.zst",
        "n-00001-of-00001.safetensors.zst",
    ]
    chunks = [shard.chunks[0] for shard in made.shards[:3]]
    assert [chunk.name for chunk in chunks] == ["w@0", "w@1", "w@2"]
    assert [chunk.offsets for chunk in chunks] == [(0, 0, 0), (0, 3, 0), (0, 6, 0)]
    assert [chunk.sizes for chunk in chunks] == [(1, 3, 100), (1, 3, 100), (1, 4, 100)]


def test_codec_none_cuts_only_above_five_gib():
    tensors = {"w": ("float32", (1000, 1000)), "huge": ("uint8", (6, 2**30))}
    made = plan(structure_of({"m": tensors}), codec="none", shard_bytes=1000)
    assert [chunk.name for shard in made.shards for chunk in shard.chunks] == ["w", "huge@0", "huge@1"]
    assert made.shards[0].name == "m-00001-of-00003.safetensors"


@pytest.mark.parametrize(("total", "shards"), [(10 * MIB, 1), (64 * MIB, 4), (2**31, 64), (2**36, 256)])
def test_shards_are_a_64th_of_the_state_within_16_and_256_mib(total, shards):
    made = plan(structure_of({"m": {f"{n}": ("uint8", (MIB,)) for n in range(64)}}), shard_bytes=None)
    assert len(made.shards) == 4
    assert len(plan(structure_of({"m": {"w": ("uint8", (total // MIB, MIB))}})).shards) == shards


def test_planes_are_for_large_floats_under_their_codec_only():
    tensors = {
        "w": ("float32", (16_384,)),
        "small": ("float32", (16_383,)),
        "ints": ("int64", (10_000,)),
        "complex": ("complex64", (10_000,)),
        "half": ("bfloat16", (32_768,)),
    }
    structure = structure_of({"m": tensors})
    assert plan(structure, codec="planes").layouts == ("planes", "plain", "plain", "plain", "planes")
    assert set(plan(structure, codec="zstd").layouts) == {"plain"}
    assert set(plan(structure, codec="none").layouts) == {"plain"}


def test_an_empty_state_has_no_shards_and_an_arena_that_can_be_mapped():
    made = plan(structure_of({}))
    assert made.shards == ()
    assert made.arena_bytes > 0


@pytest.mark.parametrize(
    ("name", "spec", "match"),
    [
        ("q", ("qint8", (3,)), "qint8"),
        ("deep", ("uint8", (1,) * 65), "dimensions"),
        ("n" * 2**20, ("uint8", (1,)), "too long"),
    ],
)
def test_a_tensor_that_the_format_cannot_hold_raises_and_is_named(name, spec, match):
    with pytest.raises(UnsupportedTensorError, match=match) as caught:
        plan(structure_of({"m": {name: spec}}))
    assert caught.value.key.startswith("m/" + name[:100])


def test_two_tensors_of_one_name_raise():
    structure = structure_of({"m": {"w": ("bool", ())}})
    with pytest.raises(ValueError, match="one name"):
        plan(Structure(structure.groups, structure.tensors * 2, (), None))


def test_a_shard_is_closed_before_its_header_grows_too_large():
    tensors = {f"{number}" + "n" * 500_000: ("uint8", (1,)) for number in range(50)}
    shards = plan(structure_of({"m": tensors})).shards
    assert len(shards) == 2
    assert all(len(shard.header) <= plans.MAX_HEADER_BYTES for shard in shards)


def test_100_000_tensors_are_planned_in_seconds_at_most():
    structure = structure_of({"m": {f"layers.{number}.weight": ("float32", (8,)) for number in range(100_000)}})
    started = time.process_time()
    made = plan(structure)
    assert sum(len(block.chunks) for shard in made.shards for block in shard.blocks) == 100_000
    assert time.process_time() - started < 5  # takes 0.8 s; a quadratic rule would take minutes
