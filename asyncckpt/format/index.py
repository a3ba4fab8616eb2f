"""The index: where every tensor's bytes are. Written once per checkpoint, held against its digest, then trusted no further.

An index may name a million chunks and as many frames, so its rows are checked column by column.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from asyncckpt.collector import seldom
from asyncckpt.errors import RecordError, ResourceLimitError
from asyncckpt.format import keys, limits, nodes, strict_json
from asyncckpt.format.digest import Buffer, from_hex
from asyncckpt.format.frames import decompress
from asyncckpt.format.index_rows import TensorRows
from asyncckpt.format.plan import StoredCodec
from asyncckpt.format.record import newer
from asyncckpt.format.stored import BlockFinder, FrameTable, IndexedChunk, IndexedShard, IndexedTensor, StoredBlock
from asyncckpt.format.structure import Group

__all__ = [
    "BlockFinder",
    "FrameTable",
    "Index",
    "IndexedChunk",
    "IndexedShard",
    "IndexedTensor",
    "StoredBlock",
]

_YOUNG_OBJECTS = (
    50_000_000  # more than an index makes: nothing of it is garbage, and its parse takes seconds, not minutes
)
_CODECS = ("planes", "zstd", "none")


@dataclass(frozen=True, slots=True)
class Index:
    """Everything a reader needs to find bytes. `tensors` and `aliases` go by full path; an alias names its tensor's path.

    `parameters`: path of an optimizer to the path of the parameter at each of its positions, or None where the state does not hold it.
    `per_rank`: paths whose stored dict goes by rank.
    """

    codec: StoredCodec
    groups: tuple[Group, ...]
    tensors: dict[str, IndexedTensor]
    aliases: dict[str, str]
    shards: tuple[IndexedShard, ...]
    tree: Any
    parameters: Mapping[str, Sequence[str | None]] = field(default_factory=dict)
    per_rank: tuple[str, ...] = ()

    @property
    def raw_bytes(self) -> int:
        """Of all tensors."""
        return sum(tensor.raw_bytes for tensor in self.tensors.values())

    @classmethod
    def unpack(cls, stored: Buffer) -> "Index":
        """`parse` of an index object as it is stored; refused as newer, before it takes memory, if its text is out of all proportion."""
        try:
            text = decompress(stored, _most_bytes(len(stored)))
        except ResourceLimitError as error:
            raise newer(f"of its index, {error.message}") from error
        return cls.parse(text)

    @classmethod
    def parse(cls, data: bytes) -> "Index":
        """Mirror of `IndexBuilder`, for text that agreed with its digest; never another error than these.

        What this asyncckpt does not know, or a limit that is exceeded: `FormatVersionError`. What breaks a rule of the format:
        `RecordError` or `UnsafeCheckpointError`.
        """
        try:
            if len(data) > limits.INDEX_BYTES:
                raise ResourceLimitError(f"an index of {len(data)} bytes is above {limits.INDEX_BYTES}")
            with seldom(_YOUNG_OBJECTS):
                return _parse(data)
        except ResourceLimitError as error:
            raise newer(error.message).at(key=error.key) from error


def check_readable(text: bytes, stored_bytes: int) -> None:
    """`ResourceLimitError` for an index that no reader would take; its writer asks before the record exists."""
    if len(text) > _most_bytes(stored_bytes):
        raise ResourceLimitError(
            f"an index of {len(text)} bytes, {stored_bytes} stored, is above {_most_bytes(stored_bytes)}"
        )
    strict_json.check_count(text, "index", limits.INDEX_VALUES)


def _most_bytes(stored_bytes: int) -> int:
    return min(limits.INDEX_BYTES, limits.INDEX_BASE_BYTES + limits.INDEX_RATIO * stored_bytes)


def _parse(data: bytes) -> Index:
    fields = strict_json.Fields(strict_json.parse(data, "index", max_values=limits.INDEX_VALUES), "index")
    version, codec = fields.size("format"), fields.get("codec", str)
    if version != strict_json.FORMAT:
        raise newer(f"its index has format {version}, and this asyncckpt reads {strict_json.FORMAT}")
    if codec not in _CODECS:
        raise newer(f"its index names the codec {codec[:40]!r}")
    groups = fields.rows("groups", _group)
    shards = fields.rows("shards", lambda row: _shard(row, codec))
    if len({group.key for group in groups}) != len(groups):
        raise RecordError("the index names a group twice")
    if len({shard.key for shard in shards}) != len(shards):
        raise RecordError("the index names a shard twice")
    rows = fields.get("tensors", list)
    if len(rows) > limits.TENSORS:
        raise ResourceLimitError(f"an index of {len(rows)} tensors is above {limits.TENSORS}")
    prefixes = ["" if group.key is None else keys.escape(group.key) + "/" for group in groups]
    stored = TensorRows(codec, prefixes, shards).read(rows)
    tensors = {tensor.path: tensor for tensor in stored}
    tied = fields.get("aliases", list)
    aliases = dict(_alias(row, prefixes, stored) for row in tied)
    if len(tensors) != len(rows) or len(aliases) != len(tied) or tensors.keys() & aliases:
        raise RecordError("the index names a tensor twice")
    return Index(
        codec=codec,
        groups=groups,
        tensors=tensors,
        aliases=aliases,
        shards=shards,
        tree=nodes.check(fields.get("tree", (dict, str)), tensors, aliases),
        parameters={path: _positions(names) for path, names in fields.get("parameters", dict, default={}).items()},
        per_rank=tuple(_path(path) for path in fields.get("per_rank", list, default=[])),
    )


def _group(row: Any) -> Group:
    fields = strict_json.Fields(row, "a group")
    key, slug = fields.get("key", (str, type(None))), fields.get("slug", str)
    try:
        return Group(None if key is None else keys.unescape(key), slug)
    except ValueError as error:
        raise RecordError("the index names a group that no key escapes to") from error


def _alias(row: Any, prefixes: Sequence[str], stored: Sequence[IndexedTensor]) -> tuple[str, str]:
    if type(row) is not list or len(row) != 3 or type(row[1]) is not str:
        raise RecordError("an alias's row is not its three fields")
    group, name, tensor = row
    if not (strict_json.is_size(group) and strict_json.is_size(tensor) and group < len(prefixes)) or tensor >= len(
        stored
    ):
        raise RecordError("an alias of no tensor")
    return prefixes[group] + name, stored[tensor].path


def _positions(names: Any) -> tuple[str | None, ...]:
    if type(names) is not list or not all(name is None or type(name) is str for name in names):
        raise RecordError("the parameters of an optimizer are a list of paths")
    return tuple(names)


def _path(value: Any) -> str:
    if type(value) is not str:
        raise RecordError("a path of the index is no text")
    return value


def _shard(data: Any, codec: str) -> IndexedShard:
    fields = strict_json.Fields(data, "a shard")
    key = keys.check_object_key(fields.get("key", str))
    raw_bytes, stored_bytes, rows = fields.size("raw_bytes"), fields.size("stored_bytes"), fields.get("frames", list)
    try:
        header = from_hex(fields.get("header", str))
    except ValueError as error:
        raise RecordError("a digest that is not 64 hex digits", key=key) from error
    if codec == "none":
        if rows or raw_bytes != stored_bytes:
            raise RecordError("a shard without codec is stored as it is", key=key)
        return IndexedShard(key, raw_bytes, stored_bytes, FrameTable.of(()), header)
    frames = _frames(rows, key)
    if frames.raw[-1] != raw_bytes or frames.stored[-1] != stored_bytes:
        raise RecordError("the frames do not make up the shard", key=key)
    return IndexedShard(key, raw_bytes, stored_bytes, frames, header)


def _frames(rows: list[Any], key: str) -> FrameTable:
    if set(map(type, rows)) != {list} or set(map(len, rows)) != {2}:
        raise RecordError("a shard whose frames are not rows of two sizes", key=key)
    if set(map(type, chain.from_iterable(rows))) != {int}:
        raise RecordError("a frame of a size that is no number", key=key)
    try:
        sizes = np.fromiter(chain.from_iterable(rows), np.int64, 2 * len(rows)).reshape(-1, 2)
    except OverflowError as error:
        if min(chain.from_iterable(rows)) < 1:
            raise RecordError("a frame of a size that cannot be", key=key) from error
        raise ResourceLimitError("a frame of a size above 2^53", key=key) from error
    if sizes.min() < 1:
        raise RecordError("a frame of a size that cannot be", key=key)
    if sizes.max() > limits.SIZE:
        raise ResourceLimitError("a frame of a size above 2^53", key=key)
    raw, stored = sizes[:, 0], sizes[:, 1]
    for largest_bytes, limit_bytes in ((raw[0], limits.HEADER_BYTES), (raw[1:].max(initial=0), limits.BLOCK_BYTES)):
        if largest_bytes > limit_bytes:
            raise ResourceLimitError(f"a frame of {largest_bytes} bytes is above {limit_bytes}", key=key)
    if (stored > 2 * raw + 1024).any():
        raise RecordError("a frame that is stored in more than twice its bytes", key=key)
    return FrameTable(raw, stored)
