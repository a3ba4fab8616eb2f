"""Checkpoints made and read with the format alone: objects in a dict, no engine, no torch."""

import json
from dataclasses import dataclass

import numpy as np

from asyncckpt.errors import DigestMismatchError
from asyncckpt.format import keys
from asyncckpt.format.digest import digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import compress, decode_block, decompress, encode_shard
from asyncckpt.format.index import BlockFinder, Index
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.limits import BLOCK_BYTES, INDEX_BYTES
from asyncckpt.format.plan import Group, Plan, Structure, TensorSpec, plan

FOLDER = keys.folder(7, "0a1b2c3d-1")


@dataclass(frozen=True)
class Receipt:
    shard: int
    key: str
    raw_bytes: int
    stored_bytes: int
    frames: tuple[tuple[int, int], ...]


@dataclass
class Stored:
    """`objects`: key to bytes; `values`: the plain bytes of each tensor of the structure."""

    plan: Plan
    objects: dict[str, bytearray]
    index: bytes  # as stored
    values: list[bytes]

    @property
    def parsed(self) -> Index:
        return Index.unpack(self.index)


def structure_of(groups: dict, aliases=(), tree=None) -> Structure:
    """From {group key: {name: (dtype, shape)}}."""
    slugs = keys.slugs(list(groups))
    return Structure(
        groups=tuple(Group(key, slug) for key, slug in zip(groups, slugs, strict=True)),
        tensors=tuple(
            TensorSpec(number, name, dtype, tuple(shape))
            for number, tensors in enumerate(groups.values())
            for name, (dtype, shape) in tensors.items()
        ),
        aliases=tuple(aliases),
        tree={"dict": {}} if tree is None else tree,
    )


def random_values(structure: Structure, seed: int = 0) -> list[bytes]:
    """Bytes of every kind: noise, weights, runs."""
    source = np.random.default_rng(seed)
    values = []
    for number, spec in enumerate(structure.tensors):
        size = int(np.prod(spec.shape, dtype=np.int64)) * DTYPES[spec.dtype].element_bytes
        noise = source.integers(0, 256, size, np.uint8)
        weights = source.standard_normal(size // 4 + 1).astype(np.float32).view(np.uint8)[:size]
        values.append((noise, weights, np.full(size, 7, np.uint8))[number % 3].tobytes())
    return values


def store(structure: Structure, codec="planes", shard_bytes=None, seed=0) -> Stored:
    """Plan, fill an arena whose gaps hold garbage, encode every shard, build the index."""
    layout = plan(structure, codec=codec, shard_bytes=shard_bytes)
    arena = memoryview(bytearray(b"\xa5" * layout.arena_bytes))
    values = random_values(structure, seed)
    for offset, value in zip(layout.tensor_offsets, values, strict=True):
        arena[offset : offset + len(value)] = value
    objects, receipts = {}, []
    for shard in layout.shards:
        stored, rows = bytearray(), []
        for frame in encode_shard(shard, arena, layout.codec, arena[layout.digests_offset :]):
            rows.append((frame.raw_bytes, len(frame.data)))
            stored += frame.data
        key = FOLDER + shard.name
        objects[key] = stored
        receipts.append(Receipt(shard.number, key, shard.raw_bytes, len(stored), tuple(rows)))
    index = IndexBuilder(layout).build(receipts[::-1], bytes(arena[layout.digests_offset :]), FOLDER)
    return Stored(layout, objects, compress(index), values)


def load(index: Index, objects: dict, path: str) -> bytes:
    """The plain bytes of a tensor, its boxes put together, every piece checked."""
    tensor = index.tensors[index.aliases.get(path, path)]
    element = DTYPES[tensor.dtype].element_bytes
    whole = np.zeros((*tensor.shape, element), np.uint8)
    for chunk in tensor.chunks:
        plain = bytearray()
        shard = index.shards[chunk.shard]
        stored = memoryview(objects[shard.key])
        for block in BlockFinder(shard).blocks(tensor, chunk):
            data = stored[block.stored_offset : block.stored_offset + block.stored_bytes]
            raw = bytearray(data if not block.frames else block.raw_bytes)
            if block.frames:
                decode_block(block.split(data), block.plane_bytes, block.raw_bytes, memoryview(raw))
            start = max(chunk.raw_offset - block.raw_offset, 0)
            plain += raw[start : start + chunk.raw_bytes - len(plain)]
        pieces = [plain[start : start + BLOCK_BYTES] for start in range(0, len(plain), BLOCK_BYTES)] or [b""]
        if b"".join(map(digest, pieces)) != chunk.digests or len(plain) != chunk.raw_bytes:
            raise DigestMismatchError("not what was stored", key=path)
        box = tuple(slice(begin, begin + size) for begin, size in zip(chunk.offsets, chunk.sizes, strict=True))
        whole[box] = np.frombuffer(plain, np.uint8).reshape((*chunk.sizes, element))
    return whole.tobytes()


def index_json(stored: Stored) -> dict:
    return json.loads(decompress(stored.index, INDEX_BYTES))


MIXED = {
    "model": {
        "embed": ("float32", (70, 1000)),
        "head": ("bfloat16", (40_000,)),
        "bias": ("float32", (3,)),
        "half": ("float16", (33_000,)),
        "empty": ("float64", (0, 5)),
        "scalar": ("int64", ()),
        "flags": ("bool", (9, 9)),
        "fp8": ("float8_e4m3fn", (130,)),
        "odd": ("complex128", (5, 5)),
    },
    "optimizer": {"state/#0/exp_avg": ("float64", (3, 1_000_000 // 3)), "state/#0/step": ("float32", ())},
    None: {"ema": ("float32", (17_000,)), "": ("uint8", (70_000,))},
}
