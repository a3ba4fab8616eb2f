"""The rows of an index's tensors and of their chunks, read column by column: a million rows one by one would take half a minute."""

import math
from collections.abc import Sequence
from itertools import chain, repeat
from operator import add, gt, itemgetter, lt, mul
from typing import Any

import numpy as np

from asyncckpt.errors import RecordError, ResourceLimitError
from asyncckpt.format import limits
from asyncckpt.format.box import covers
from asyncckpt.format.digest import DIGEST_BYTES, digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.plan import LARGE_BYTES, StoredCodec, piece_count
from asyncckpt.format.record import newer
from asyncckpt.format.stored import IndexedChunk, IndexedShard, IndexedTensor

_LAYOUTS = {"plain", "planes"}
_NOTHING = digest()


class TensorRows:
    """Holds the rows against each other, and against the groups and shards that the index named before."""

    def __init__(self, codec: StoredCodec, prefixes: Sequence[str], shards: Sequence[IndexedShard]) -> None:
        self._codec = codec
        self._prefixes = prefixes
        self._raw_bytes = [shard.raw_bytes for shard in shards]
        self._headers = [int(shard.frames.raw[1]) if len(shard.frames) else 0 for shard in shards]

    def read(self, rows: list[Any]) -> list[IndexedTensor]:
        """The tensors; `RecordError`, or `FormatVersionError` for an unknown element type or layout."""
        groups, names, dtypes, shapes, layouts, chunk_rows = _columns(rows, 6, "a tensor's row is not its six fields")
        if not _are_texts(names) or not _below(groups, len(self._prefixes)):
            raise RecordError("a tensor of no group, or without a name")
        if not _are(dtypes, str) or not _are(layouts, str):
            raise RecordError("a tensor whose element type or layout is no name")
        for what, unknown in (
            ("element type", set(dtypes) - DTYPES.keys()),
            ("layout", set(layouts) - _LAYOUTS),
        ):
            if unknown:
                raise newer(f"its index names the {what} {min(unknown)[:40]!r}")
        paths = [self._prefixes[group] + name for group, name in zip(groups, names, strict=True)]
        shapes = _extents(shapes)
        kinds = list(zip(dtypes, layouts, strict=True))
        for dtype, layout in set(kinds):
            if layout == "planes" and not (self._codec == "planes" and DTYPES[dtype].planes):
                raise RecordError(f"layout 'planes' of {dtype} under codec {self._codec!r}")
        if not _are(chunk_rows, list) or not all(chunk_rows):
            raise RecordError("a tensor without chunks")
        counts = list(map(len, chunk_rows))
        chunks = self._chunks(list(chain.from_iterable(chunk_rows)), kinds, counts)
        found, end = [], 0
        for group, name, path, (dtype, layout), shape, count in zip(
            groups, names, paths, kinds, shapes, counts, strict=True
        ):
            own = tuple(chunks[end : end + count])
            end += count
            if 0 in shape and hollow_bytes(shape, DTYPES[dtype].element_bytes) > limits.HOLLOW_BYTES:
                raise ResourceLimitError(
                    f"a tensor without elements whose extents are above {limits.HOLLOW_BYTES} bytes"
                )
            _check_boxes(own, shape, path)
            found.append(IndexedTensor(group, name, path, dtype, shape, layout, own))
        return found

    def _chunks(self, rows: list[Any], kinds: list[tuple[str, str]], counts: list[int]) -> list[IndexedChunk]:
        """All chunks of all tensors, in order."""
        begins, lengths, shards, raw_offsets, digits = _columns(rows, 5, "a chunk's row is not its five fields")
        if not _below(shards, len(self._raw_bytes)) or not _sizes(raw_offsets):
            raise RecordError("a chunk in no shard")
        offsets, sizes = _extents(begins), _extents(lengths)
        element_bytes = {kind: DTYPES[kind[0]].element_bytes for kind in set(kinds)}
        of_kind = list(chain.from_iterable(map(repeat, kinds, counts)))
        raw_bytes = list(map(mul, map(math.prod, sizes), map(element_bytes.__getitem__, of_kind)))
        ends = map(add, raw_offsets, raw_bytes)
        if any(map(gt, ends, map(self._raw_bytes.__getitem__, shards))):
            raise RecordError("a chunk that reaches out of its shard")
        if any(map(lt, raw_offsets, map(self._headers.__getitem__, shards))):
            raise RecordError("a chunk in its shard's header")
        _check_ranges(shards, raw_offsets, raw_bytes, of_kind)
        digests = _digests(digits, raw_bytes)
        return list(map(IndexedChunk, offsets, sizes, shards, raw_offsets, raw_bytes, digests))


def hollow_bytes(shape: tuple[int, ...], element_bytes: int) -> int:
    """The bytes of a tensor if its extents of 0 were 1; strides are made of these."""
    return math.prod(filter(None, shape)) * element_bytes


def _columns(rows: list[Any], count: int, message: str) -> list[list[Any]]:
    if not _are(rows, list) or not set(map(len, rows)) <= {count}:
        raise RecordError(message)
    return [list(map(itemgetter(number), rows)) for number in range(count)]


def _are_texts(values: list[Any]) -> bool:
    """Strings that UTF-8 can hold: without half of a surrogate pair."""
    if not _are(values, str):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:
        return False
    return True


def _are(values: list[Any], kind: type) -> bool:
    return set(map(type, values)) <= {kind}


def _below(values: list[Any], limit: int) -> bool:
    """Whether these are whole numbers from 0 on, below a limit."""
    return _are(values, int) and (not values or (min(values) >= 0 and max(values) < limit))


def _sizes(values: list[Any]) -> bool:
    """Whether these are whole numbers from 0 on; `ResourceLimitError` for one above 2^53."""
    if not _are(values, int) or (values and min(values) < 0):
        return False
    if values and max(values) > limits.SIZE:
        raise ResourceLimitError("a size or an offset above 2^53")
    return True


def _extents(values: list[Any]) -> list[tuple[int, ...]]:
    """Shapes, offsets or sizes."""
    if not _are(values, list) or not _sizes(list(chain.from_iterable(values))):
        raise RecordError("a shape, an offset or a size that cannot be")
    if max(map(len, values), default=0) > limits.RANK:
        raise ResourceLimitError(f"a tensor of more than {limits.RANK} dimensions")
    return list(map(tuple, values))


def _digests(digits: list[Any], raw_bytes: list[int]) -> list[bytes]:
    """The digests of each chunk's pieces, joined."""
    counts = list(map(piece_count, raw_bytes))
    if not _are(digits, str) or list(map(len, digits)) != [2 * DIGEST_BYTES * count for count in counts]:
        raise RecordError("a chunk that has not one digest for every piece")
    joined = "".join(digits)
    try:
        table = bytes.fromhex(joined)
    except ValueError as error:
        raise RecordError("a digest that is not 64 hex digits") from error
    if table.hex() != joined:
        raise RecordError("a digest that is not 64 lower-case hex digits")
    found, end = [], 0
    for count in counts:
        found.append(table[end : end + count * DIGEST_BYTES])
        end += count * DIGEST_BYTES
    if any(size == 0 and value != _NOTHING for size, value in zip(raw_bytes, found, strict=True)):
        raise RecordError("a chunk without bytes whose digest is not that of nothing")
    return found


def _check_ranges(
    shards: list[int], raw_offsets: list[int], raw_bytes: list[int], kinds: list[tuple[str, str]]
) -> None:
    """Two chunks name the same bytes of a shard, of one layout and element size, or bytes that do not overlap; planes have large ones."""
    codes = {kind: 2 * DTYPES[kind[0]].element_bytes + (kind[1] == "planes") for kind in set(kinds)}
    columns = (shards, raw_offsets, raw_bytes, map(codes.__getitem__, kinds))
    shard, start, size, code = (np.fromiter(column, np.int64, len(shards)) for column in columns)
    if (size[code % 2 == 1] < LARGE_BYTES).any():
        raise RecordError("layout 'planes' of a small chunk")
    order = np.lexsort((size, start, shard))
    order = order[size[order] > 0]
    shard, start, size, code = shard[order], start[order], size[order], code[order]
    apart = (shard[1:] != shard[:-1]) | (start[1:] >= start[:-1] + size[:-1])
    same = (start[1:] == start[:-1]) & (size[1:] == size[:-1]) & (code[1:] == code[:-1])
    if not (apart | same).all():
        raise RecordError("two chunks that overlap in a shard")


def _check_boxes(chunks: Sequence[IndexedChunk], shape: tuple[int, ...], path: str) -> None:
    """Together every element exactly once, in the order of their offsets."""
    if len(chunks) == 1 and chunks[0].sizes == shape and chunks[0].offsets == (0,) * len(shape):
        return
    if {len(chunk.offsets) for chunk in chunks} | {len(chunk.sizes) for chunk in chunks} != {len(shape)}:
        raise RecordError("a chunk of another rank than its tensor", key=path)
    offsets = [chunk.offsets for chunk in chunks]
    if not all(map(lt, offsets, offsets[1:])):
        raise RecordError("chunks that do not stand in the order of their offsets", key=path)
    if not all(chunk.raw_bytes for chunk in chunks) or not covers(offsets, [chunk.sizes for chunk in chunks], shape):
        raise RecordError("chunks that do not hold every element of their tensor exactly once", key=path)
