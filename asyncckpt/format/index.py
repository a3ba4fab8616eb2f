"""The index: where every tensor's bytes are. Written once per checkpoint, held against its digest, then trusted no further."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from asyncckpt.errors import CorruptCheckpointError, RecordError, ResourceLimitError
from asyncckpt.format import keys, strict_json
from asyncckpt.format.digest import from_hex
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.plan import BLOCK_BYTES, StoredCodec
from asyncckpt.format.shard import MAX_HEADER_BYTES, MAX_RANK, MAX_TENSORS
from asyncckpt.format.stored import IndexedChunk, IndexedShard, IndexedTensor, Row, StoredBlock
from asyncckpt.format.structure import Group

__all__ = [
    "Index",
    "IndexedChunk",
    "IndexedShard",
    "IndexedTensor",
    "StoredBlock",
    "blocks_of",
]

MAX_INDEX_BYTES = 2**30
MAX_TREE_DEPTH = 256


@dataclass(frozen=True, slots=True)
class Index:
    """Everything a reader needs to find bytes. `tensors` and `aliases` go by full path; an alias names its tensor's path.

    `parameters`: path of an optimizer to the path of the parameter at each of its positions, or None where the state does not hold it.
    """

    codec: StoredCodec
    groups: tuple[Group, ...]
    tensors: dict[str, IndexedTensor]
    aliases: dict[str, str]
    shards: tuple[IndexedShard, ...]
    tree: Any
    parameters: Mapping[str, Sequence[str | None]] = field(default_factory=dict)

    @property
    def raw_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.raw_bytes for tensor in self.tensors.values())

    @classmethod
    def parse(cls, data: bytes) -> "Index":
        """Mirror of `IndexBuilder`. `RecordError`, `ResourceLimitError` or `UnsafeCheckpointError`; never another error."""
        if len(data) > MAX_INDEX_BYTES:
            raise ResourceLimitError(f"an index of {len(data)} bytes is above {MAX_INDEX_BYTES}")
        fields = strict_json.Fields(strict_json.parse(data, "index", max_values=40 * MAX_TENSORS), "index")
        fields.check_version()
        codec = fields.get("codec", str)
        if codec not in ("planes", "zstd", "none"):
            raise RecordError(f"the index names an unknown codec {codec[:40]!r}")
        groups = fields.rows("groups", _group)
        shards = fields.rows("shards", lambda row: _shard(row, codec))
        if len({group.key for group in groups}) != len(groups):
            raise RecordError("the index names a group twice")
        rows = fields.get("tensors", list)
        if len(rows) > MAX_TENSORS:
            raise ResourceLimitError(f"an index of {len(rows)} tensors is above {MAX_TENSORS}")
        reader = _TensorReader(codec, groups, shards)
        stored = [reader.read(row) for row in rows]
        tensors = {tensor.path: tensor for tensor in stored}
        aliases = dict(reader.alias(row, stored) for row in fields.get("aliases", list))
        if len(tensors) != len(rows) or len(aliases) != len(fields.get("aliases", list)) or tensors.keys() & aliases:
            raise RecordError("the index names a tensor twice")
        tree = strict_json.check(fields.get("tree", (dict, str)), "the index's tree", max_depth=MAX_TREE_DEPTH)
        parameters = {path: _positions(names) for path, names in fields.get("parameters", dict, default={}).items()}
        return cls(codec, groups, tensors, aliases, shards, tree, parameters)


def blocks_of(index: Index, tensor: IndexedTensor, chunk: IndexedChunk) -> list[StoredBlock]:
    """The blocks that hold a chunk, in order. A small chunk's block may hold others too: compare the raw offsets.

    `CorruptCheckpointError` if the frames are not cut as the format says.
    """
    shard = index.shards[chunk.shard]
    start, end = chunk.raw_offset, chunk.raw_offset + chunk.raw_bytes
    if start == end:
        return []
    planes = tensor.plane_bytes
    if planes == 1 and shard.frames:
        rows = shard.stored_range(start, end)[2]
        return [StoredBlock(row[2], row[3], (row,), row[0], row[1], 1) for row in rows]
    blocks = []
    for offset in range(start, end, BLOCK_BYTES):
        size = min(BLOCK_BYTES, end - offset)
        stored_offset, stored_bytes, rows = shard.stored_range(offset, offset + size)
        block = StoredBlock(stored_offset, stored_bytes, rows, offset, size, planes)
        if rows and (rows[0][0] != offset or len(rows) != planes or any(row[1] * planes != size for row in rows)):
            raise CorruptCheckpointError("frames that are no planes of a block", key=tensor.path)
        blocks.append(block)
    return blocks


def _group(row: Any) -> Group:
    fields = strict_json.Fields(row, "a group")
    key, slug = fields.get("key", (str, type(None))), fields.get("slug", str)
    try:
        return Group(None if key is None else keys.unescape(key), slug)
    except ValueError as error:
        raise RecordError("the index names a group that no key escapes to") from error


def _positions(names: Any) -> tuple[str | None, ...]:
    if type(names) is not list or not all(name is None or type(name) is str for name in names):
        raise RecordError("the parameters of an optimizer are a list of paths")
    return tuple(names)


def _shard(data: Any, codec: str) -> IndexedShard:
    fields = strict_json.Fields(data, "a shard")
    key = keys.check_object_key(fields.get("key", str))
    raw_bytes, stored_bytes = fields.size("raw_bytes"), fields.size("stored_bytes")
    header, frames = _digest(fields.get("header", str), key), fields.rows("frames", _frame)
    if codec == "none":
        if frames or raw_bytes != stored_bytes:
            raise RecordError("a shard without codec is stored as it is", key=key)
        return IndexedShard(key, raw_bytes, stored_bytes, frames, header)
    raw = stored = 0
    for number, row in enumerate(frames):
        if row[0] != raw or row[2] != stored or not row[1] or not row[3]:
            raise RecordError("a hole or an overlap between frames", key=key)
        if row[1] > (BLOCK_BYTES if number else MAX_HEADER_BYTES) or row[3] > 2 * row[1] + 1024:
            raise ResourceLimitError(f"a frame of {row[1]} bytes in {row[3]} is above the limit", key=key)
        raw += row[1]
        stored += row[3]
    if raw != raw_bytes or stored != stored_bytes:
        raise RecordError("the frames do not make up the shard", key=key)
    return IndexedShard(key, raw_bytes, stored_bytes, frames, header)


def _frame(row: Any) -> Row:
    if type(row) is not list or len(row) != 4 or not all(map(strict_json.is_size, row)):
        raise RecordError("a frame's row is not four sizes")
    return (row[0], row[1], row[2], row[3])


def _digest(digits: Any, key: str) -> bytes:
    try:
        return from_hex(digits)
    except (ValueError, TypeError) as error:
        raise RecordError("a digest that is not 64 hex digits", key=key) from error


class _TensorReader:
    """Checks one tensor's row against what the index said before."""

    def __init__(self, codec: str, groups: tuple[Group, ...], shards: tuple[IndexedShard, ...]) -> None:
        self.codec = codec
        self.shards = shards
        self.prefixes = ["" if group.key is None else keys.escape(group.key) + "/" for group in groups]

    def read(self, row: Any) -> IndexedTensor:
        if type(row) is not list or len(row) != 6:
            raise RecordError("a tensor's row is not its six fields")
        group, name, dtype, shape, layout, chunks = row
        path = self._path(group, name)
        kind = DTYPES.get(dtype) if type(dtype) is str else None
        if kind is None:
            raise RecordError(f"unknown element type {str(dtype)[:40]!r}; a newer asyncckpt may know it", key=path)
        if layout not in ("plain", "planes") or (layout == "planes" and not (kind.planes and self.codec == "planes")):
            raise RecordError(f"layout {str(layout)[:40]!r} cannot be", key=path)
        extent = _sizes(shape, path)
        if type(chunks) is not list or not chunks:
            raise RecordError("a tensor without chunks", key=path)
        read = tuple(self._chunk(chunk, extent, kind.element_bytes, path) for chunk in chunks)
        if len(read) > 1 or read[0].sizes != extent:
            _check_grid(read, extent, path)
        return IndexedTensor(group, name, path, dtype, extent, layout, read)

    def alias(self, row: Any, stored: Sequence[IndexedTensor]) -> tuple[str, str]:
        if type(row) is not list or len(row) != 3 or not strict_json.is_size(row[2]) or row[2] >= len(stored):
            raise RecordError("an alias's row is not its three fields")
        return self._path(row[0], row[1]), stored[row[2]].path

    def _path(self, group: Any, name: Any) -> str:
        if type(group) is not int or not 0 <= group < len(self.prefixes) or type(name) is not str:
            raise RecordError("a tensor of no group")
        return self.prefixes[group] + name

    def _chunk(self, row: Any, extent: tuple[int, ...], element_bytes: int, path: str) -> IndexedChunk:
        if type(row) is not list or len(row) != 5:
            raise RecordError("a chunk's row is not its five fields", key=path)
        shard, raw_offset, digits = row[2:]
        if type(shard) is not int or not 0 <= shard < len(self.shards) or not strict_json.is_size(raw_offset):
            raise RecordError("a chunk in no shard", key=path)
        offsets, sizes = _box(row[0], row[1], extent, path)
        raw_bytes = math.prod(sizes) * element_bytes
        if raw_offset + raw_bytes > self.shards[shard].raw_bytes:
            raise RecordError("a chunk that reaches out of its shard", key=path)
        return IndexedChunk(offsets, sizes, shard, raw_offset, raw_bytes, _digest(digits, path))


def _sizes(values: Any, path: str) -> tuple[int, ...]:
    if type(values) is not list or len(values) > MAX_RANK or not all(map(strict_json.is_size, values)):
        raise RecordError("a shape or an offset that cannot be", key=path)
    return tuple(values)


def _box(offsets: Any, sizes: Any, extent: tuple[int, ...], path: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    start, size = _sizes(offsets, path), _sizes(sizes, path)
    if len(start) != len(extent) or len(size) != len(extent):
        raise RecordError("a chunk of another rank than its tensor", key=path)
    if any(begin + count > whole for begin, count, whole in zip(start, size, extent, strict=True)):
        raise RecordError("a chunk that reaches out of its tensor", key=path)
    return start, size


def _check_grid(chunks: Sequence[IndexedChunk], extent: tuple[int, ...], path: str) -> None:
    """Every element in exactly one chunk: boxes inside the tensor, each one cell of a grid, no two alike, that make up the volume."""
    borders = [
        sorted(
            {chunk.offsets[axis] for chunk in chunks} | {chunk.offsets[axis] + chunk.sizes[axis] for chunk in chunks}
        )
        for axis in range(len(extent))
    ]
    after = [dict(pairwise(edges)) for edges in borders]
    cells = all(
        after[axis].get(chunk.offsets[axis]) == chunk.offsets[axis] + chunk.sizes[axis]
        for chunk in chunks
        for axis in range(len(extent))
    )
    volume = sum(math.prod(chunk.sizes) for chunk in chunks)
    if not cells or len({chunk.offsets for chunk in chunks}) != len(chunks) or volume != math.prod(extent):
        raise RecordError("chunks that are no grid over their tensor", key=path)
