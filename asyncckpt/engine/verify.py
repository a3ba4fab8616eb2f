"""Reading everything that a checkpoint stores, to find damage before a restore does."""

from collections.abc import Iterator, Mapping

from asyncckpt import errors
from asyncckpt.checkpoints import rereading
from asyncckpt.checkpoints.rereading import Wrong
from asyncckpt.engine.fetch import check_size, fetch
from asyncckpt.format.digest import digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import decode_frame, digest_of_frame
from asyncckpt.format.index import Index
from asyncckpt.format.limits import HEADER_BYTES
from asyncckpt.format.record import newer
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
        header = _read_header(store, shard)
        try:
            described = parse_header(header, shard.raw_bytes)
        except errors.ResourceLimitError as error:
            raise newer(f"of a shard, {error.message}").at(key=shard.key) from error
        except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
            raise errors.CorruptCheckpointError(
                f"the shard's header is damaged: {error.message}", key=shard.key
            ) from error
        if not _agree(described, named.get(number, set()), own=shard.key.startswith(folder)):
            raise errors.CorruptCheckpointError("the shard's header and the index differ", key=shard.key)
    for paths in _batches(index):
        fetch(store, index, paths)


def _read_header(store: Store, shard: IndexedShard) -> bytes:
    """The header of a shard that has the size that the index states, verified."""

    def header(place: Store) -> bytes | Wrong:
        return _look_at_header(place, shard)

    check_size(store, shard)
    return rereading.certain(store, shard.key, header)


def _look_at_header(store: Store, shard: IndexedShard) -> bytes | Wrong:
    data = bytearray(int(shard.frames.stored[1]) if len(shard.frames) else _LENGTH_BYTES)
    if wrong := rereading.read_into(store, shard.key, 0, memoryview(data)):
        return wrong
    try:
        if len(shard.frames):
            found = digest_of_frame(data, int(shard.frames.raw[1]))
        else:
            size = _LENGTH_BYTES + int.from_bytes(data, "little")
            if size > min(HEADER_BYTES, shard.raw_bytes):
                raise errors.CorruptCheckpointError(f"a header of {size} bytes in a shard of {shard.raw_bytes}")
            data = bytearray(size)
            if wrong := rereading.read_into(store, shard.key, 0, memoryview(data)):
                return wrong
            found = digest(data)
        if found != shard.header_digest:
            raise rereading.mismatch("the shard's header", found, shard.header_digest.hex())
    except (errors.CorruptCheckpointError, errors.UnsafeCheckpointError) as error:
        return rereading.refused(error, 0, len(data), digest(data))
    if not len(shard.frames):
        return bytes(data)
    header = bytearray(int(shard.frames.raw[1]))
    decode_frame(data, memoryview(header))
    return bytes(header)


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
