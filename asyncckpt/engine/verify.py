"""Reading everything that a checkpoint stores, to find damage before a restore does."""

from collections.abc import Iterator, Mapping

from asyncckpt import errors
from asyncckpt.engine.fetch import fetch
from asyncckpt.format.digest import digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import decompress
from asyncckpt.format.index import Index
from asyncckpt.format.limits import HEADER_BYTES
from asyncckpt.format.shard import HeaderTensor, parse_header
from asyncckpt.format.stored import IndexedShard
from asyncckpt.store.base import Store

BATCH_BYTES = 2**30
"""Plain bytes in memory at a time; one larger tensor stands alone."""
_LENGTH_BYTES = 8

Described = tuple[str, HeaderTensor]
"""A name in a shard's header, and what stands there of it."""


def verify_objects(store: Store, index: Index, folder: str) -> None:
    """Sizes and headers of all shards, then every tensor's bytes. Raises the precise error with the object's key.

    `folder`: the record's own. A shard there holds what the index names and nothing else; one of another folder may hold more.
    """
    named = _named(index)
    for number, shard in enumerate(index.shards):
        try:
            _check_size(store, shard)
            header = _header(store, shard)
        except errors.CheckpointError as error:
            error.at(key=shard.key)
            raise
        if digest(header) != shard.header_digest:
            raise errors.DigestMismatchError("the shard's header differs from its digest", key=shard.key)
        try:
            described = parse_header(header, shard.raw_bytes)
        except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
            raise errors.CorruptCheckpointError(f"the shard's header is damaged: {error}", key=shard.key) from error
        if not _agree(described, named.get(number, set()), own=shard.key.startswith(folder)):
            raise errors.CorruptCheckpointError("the shard's header and the index differ", key=shard.key)
    for paths in _batches(index):
        fetch(store, index, paths)


def _check_size(store: Store, shard: IndexedShard) -> None:
    entry = store.head(shard.key)
    if entry is None:
        raise errors.MissingShardError("an object that the index names is gone")
    if entry.stored_bytes != shard.stored_bytes:
        raise errors.CorruptCheckpointError(
            f"the object has {entry.stored_bytes} bytes, the index states {shard.stored_bytes}"
        )


def _header(store: Store, shard: IndexedShard) -> bytes:
    if len(shard.frames):
        data = bytearray(int(shard.frames.stored[1]))
        store.get_into(shard.key, 0, memoryview(data))
        return decompress(data, int(shard.frames.raw[1]))
    length = bytearray(_LENGTH_BYTES)
    store.get_into(shard.key, 0, memoryview(length))
    size = _LENGTH_BYTES + int.from_bytes(length, "little")
    if size > min(HEADER_BYTES, shard.raw_bytes):
        raise errors.CorruptCheckpointError(f"a header of {size} bytes in a shard of {shard.raw_bytes}")
    data = bytearray(size)
    store.get_into(shard.key, 0, memoryview(data))
    return bytes(data)


def _named(index: Index) -> dict[int, set[Described]]:
    """What the index names in each shard, as the shard's header may describe it."""
    named: dict[int, set[Described]] = {}
    for tensor in index.tensors.values():
        kind = DTYPES[tensor.dtype].safetensors if tensor.layout == "plain" else None
        for number, chunk in enumerate(tensor.chunks):
            name = f"{tensor.name}@{number}" if len(tensor.chunks) > 1 else tensor.name
            shape = (chunk.raw_bytes,) if kind is None else chunk.sizes
            entry = HeaderTensor(kind or "U8", shape, chunk.raw_offset, chunk.raw_bytes)
            named.setdefault(chunk.shard, set()).add((name, entry))
    return named


def _agree(described: Mapping[str, HeaderTensor], named: set[Described], *, own: bool) -> bool:
    """Whether a header describes the ranges that the index names; where chunks name the same bytes it has one of their names."""
    ranges = {_range(tensor) for tensor in described.values()}
    if not all(_range(tensor) in ranges for _, tensor in named):
        return False
    return not own or described.items() <= named


def _range(tensor: HeaderTensor) -> tuple[int, int]:
    return tensor.raw_offset, tensor.raw_bytes


def _batches(index: Index) -> Iterator[list[str]]:
    """All tensors in stored order, some at a time."""
    stored = sorted(index.tensors.values(), key=lambda one: (one.chunks[0].shard, one.chunks[0].raw_offset))
    batch: list[str] = []
    filled = 0
    for tensor in stored:
        size = sum(chunk.raw_bytes for chunk in tensor.chunks)
        if batch and filled + size > BATCH_BYTES:
            yield batch
            batch, filled = [], 0
        batch.append(tensor.path)
        filled += size
    if batch:
        yield batch
