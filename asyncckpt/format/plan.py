"""The plan: which byte of which tensor stands where, in the arena and in the shards.

Deterministic: trainer and service make the same plan from the same structure, so only the structure travels. The rules
are those of FORMAT.md, sections "Shards" and "Blocks and frames".
"""

import math
import mmap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from asyncckpt.errors import UnsupportedTensorError
from asyncckpt.format.digest import DIGEST_BYTES
from asyncckpt.format.dtypes import DTYPES, DType
from asyncckpt.format.limits import BLOCK_BYTES, RANK
from asyncckpt.format.shard import build_header, header_entry
from asyncckpt.format.structure import Group, Structure, TensorSpec
from asyncckpt.options import StoredCodec

__all__ = [
    "BLOCK_BYTES",
    "Block",
    "Chunk",
    "Group",
    "Plan",
    "ShardPlan",
    "StoredCodec",
    "Structure",
    "TensorSpec",
    "plan",
]

Layout = Literal["planes", "plain"]

LARGE_BYTES = 64 * 2**10
"""A chunk of this size or more has blocks of its own, of `BLOCK_BYTES` each, the last one smaller: no element is cut."""
ALIGN_BYTES = 64
SHARD_BYTES = range(16 * 2**20, 256 * 2**20)
UNCUT_BYTES = 5 * 2**30  # codec none: as much as one put of S3 takes
MAX_ENTRY_BYTES = 2**20  # one tensor's line in a header
MAX_HEADER_BYTES = 16 * 2**20  # safetensors reads at most 100 MB


@dataclass(frozen=True, slots=True)
class Chunk:
    """A tensor, or a part of one along its first dimension longer than one, in one shard.

    `first_piece`: the number of its first piece among all pieces of the plan; the digest of piece n stands in the arena at
    `digests_offset + 32 * n`. `name`: in the safetensors header, `name@k` if the tensor is cut. `raw_offset`: from byte 0 of the
    safetensors stream. `plane_bytes`: the element size in layout `planes`, else 1.
    """

    first_piece: int
    tensor: int
    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    arena_offset: int
    raw_offset: int
    raw_bytes: int
    plane_bytes: int

    @property
    def pieces(self) -> int:
        """How many digests it has."""
        return piece_count(self.raw_bytes)


@dataclass(frozen=True, slots=True)
class Block:
    """What is encoded, decoded and fetched as one. `pieces`: arena offset and bytes, merged where neighbours touch.

    `chunks`: positions within the shard of the chunks it holds, whole small ones or (a part of) one large one.
    """

    raw_offset: int
    raw_bytes: int
    plane_bytes: int
    pieces: tuple[tuple[int, int], ...]
    chunks: range


@dataclass(frozen=True)
class ShardPlan:
    """One object: `header`, then the chunks without holes. `raw_bytes`: header and data."""

    number: int
    group: int
    name: str
    header: bytes
    chunks: tuple[Chunk, ...]
    raw_bytes: int

    @cached_property
    def blocks(self) -> tuple[Block, ...]:
        """The data behind the header, cut for encoding."""
        return tuple(_blocks(self.chunks))


@dataclass(frozen=True)
class Plan:
    """Where everything is. `tensor_offsets`: of each tensor in the arena, where it stands whole.

    `data_bytes`: of all tensors. `digests_offset`: of the table with one digest per piece, behind the tensors.
    """

    structure: Structure
    codec: StoredCodec
    shards: tuple[ShardPlan, ...]
    tensor_offsets: tuple[int, ...]
    layouts: tuple[Layout, ...]
    data_bytes: int
    piece_count: int
    digests_offset: int
    arena_bytes: int


def piece_count(raw_bytes: int) -> int:
    """Digests of a chunk of so many bytes: one for every `BLOCK_BYTES`, and one for a chunk without bytes."""
    return max(1, -(-raw_bytes // BLOCK_BYTES))


def plan(structure: Structure, *, codec: StoredCodec = "planes", shard_bytes: int | None = None) -> Plan:
    """Lay out a state. `shard_bytes` defaults to a 64th of the state within 16 to 256 MiB.

    `UnsupportedTensorError` for a dtype, rank or name that the format cannot hold.
    """
    sizes = [_tensor_bytes(structure, position) for position in range(len(structure.tensors))]
    data_bytes = sum(sizes)
    if shard_bytes is None:
        shard_bytes = min(max(-(-data_bytes // 64), SHARD_BYTES.start), SHARD_BYTES.stop)
    layout = _Layout(structure, codec)
    for group, members in enumerate(_members(structure)):
        layout.add_group(group, _fill(structure, members, sizes, codec, shard_bytes))
    digests_offset = _align(layout.arena_bytes, ALIGN_BYTES)
    return Plan(
        structure=structure,
        codec=codec,
        shards=tuple(layout.shards),
        tensor_offsets=tuple(layout.tensor_offsets),
        layouts=tuple(layout.layouts),
        data_bytes=data_bytes,
        piece_count=layout.piece_count,
        digests_offset=digests_offset,
        arena_bytes=_align(max(digests_offset + DIGEST_BYTES * layout.piece_count, 1), mmap.PAGESIZE),
    )


@dataclass(slots=True)
class _Part:
    """A chunk before it has a place. `first`: it begins its tensor. `entry`: its line in the header without offsets."""

    tensor: int
    name: str
    offsets: tuple[int, ...]
    sizes: tuple[int, ...]
    raw_bytes: int
    element_bytes: int
    plane_bytes: int
    first: bool
    entry: str


class _Layout:
    """Gives every part its place, shard after shard."""

    def __init__(self, structure: Structure, codec: StoredCodec) -> None:
        self.structure = structure
        self.suffix = ".safetensors" if codec == "none" else ".safetensors.zst"
        self.shards: list[ShardPlan] = []
        self.tensor_offsets = [0] * len(structure.tensors)
        self.layouts: list[Layout] = ["plain"] * len(structure.tensors)
        self.arena_bytes = 0
        self.piece_count = 0

    def add_group(self, group: int, shards: Sequence[list[_Part]]) -> None:
        slug = self.structure.groups[group].slug
        for number, parts in enumerate(shards, 1):
            # falling element size: every tensor is aligned in the file, without holes
            parts.sort(key=lambda part: -part.element_bytes)
            self._add_shard(group, f"{slug}-{number:05d}-of-{len(shards):05d}{self.suffix}", parts)

    def _add_shard(self, group: int, name: str, parts: Sequence[_Part]) -> None:
        header = build_header((part.entry, part.raw_bytes) for part in parts)
        raw_offset = len(header)
        arena = self.arena_bytes
        chunks = []
        for part in parts:
            if part.first:
                self.tensor_offsets[part.tensor] = arena = _align(arena, ALIGN_BYTES)
                if part.plane_bytes > 1:
                    self.layouts[part.tensor] = "planes"
            where = (part.offsets, part.sizes, arena, raw_offset)
            chunks.append(Chunk(self.piece_count, part.tensor, part.name, *where, part.raw_bytes, part.plane_bytes))
            arena += part.raw_bytes
            raw_offset += part.raw_bytes
            self.piece_count += piece_count(part.raw_bytes)
        self.arena_bytes = arena
        self.shards.append(ShardPlan(len(self.shards), group, name, header, tuple(chunks), raw_offset))


def _members(structure: Structure) -> list[list[int]]:
    members: list[list[int]] = [[] for _ in structure.groups]
    for position, spec in enumerate(structure.tensors):
        members[spec.group].append(position)
    for group, positions in enumerate(members):
        names = {structure.tensors[position].name for position in positions}
        if len(names) != len(positions):
            raise ValueError(f"two tensors of group {structure.groups[group].key!r} have one name")
    return members


def _tensor_bytes(structure: Structure, position: int) -> int:
    spec = structure.tensors[position]
    if spec.dtype not in DTYPES:
        raise UnsupportedTensorError(f"tensors of {spec.dtype} cannot be stored", key=structure.path(position))
    if len(spec.shape) > RANK:
        raise UnsupportedTensorError(f"more than {RANK} dimensions cannot be stored", key=structure.path(position))
    return math.prod(spec.shape) * DTYPES[spec.dtype].element_bytes


def _fill(
    structure: Structure, members: Sequence[int], sizes: Sequence[int], codec: StoredCodec, shard_bytes: int
) -> list[list[_Part]]:
    """The shards of one group: tensors in their order, a cut one in shards of its own."""
    shards: list[list[_Part]] = []
    filling: list[_Part] | None = None
    room = header_room = 0
    cut_bytes = UNCUT_BYTES if codec == "none" else shard_bytes
    for position in members:
        spec, size = structure.tensors[position], sizes[position]
        parts = _parts(position, spec, size, codec, cut_bytes)
        longest = max(len(part.entry) for part in parts)
        if longest > MAX_ENTRY_BYTES:
            raise UnsupportedTensorError("the name is too long to be stored", key=structure.path(position)[:1000])
        if len(parts) > 1:
            shards += [[part] for part in parts]
            continue
        if filling is None or size > room or longest + 64 > header_room:
            filling = []
            shards.append(filling)
            room, header_room = shard_bytes, MAX_HEADER_BYTES
        filling += parts
        room -= size
        header_room -= longest + 64  # the offsets and punctuation
    return shards


def _parts(position: int, spec: TensorSpec, size: int, codec: StoredCodec, cut_bytes: int) -> list[_Part]:
    kind, rank = DTYPES[spec.dtype], len(spec.shape)
    axis = next((axis for axis in range(rank) if spec.shape[axis] > 1), None)
    if size <= cut_bytes or axis is None:
        plane = _plane_bytes(kind, size, codec)
        entry = _entry(spec.name, kind, spec.shape, size, plane)
        return [_Part(position, spec.name, (0,) * rank, spec.shape, size, kind.element_bytes, plane, True, entry)]
    length = spec.shape[axis]
    row_bytes = size // length
    count = min(-(-size // cut_bytes), length)
    plane = _plane_bytes(kind, length // count * row_bytes, codec)
    parts = []
    for number in range(count):
        start, stop = number * length // count, (number + 1) * length // count
        name, raw_bytes = f"{spec.name}@{number}", (stop - start) * row_bytes
        offsets = (*(0,) * axis, start, *(0,) * (rank - axis - 1))
        sizes = (*spec.shape[:axis], stop - start, *spec.shape[axis + 1 :])
        entry = _entry(name, kind, sizes, raw_bytes, plane)
        parts.append(_Part(position, name, offsets, sizes, raw_bytes, kind.element_bytes, plane, number == 0, entry))
    return parts


def _plane_bytes(kind: DType, smallest_chunk_bytes: int, codec: StoredCodec) -> int:
    return kind.element_bytes if codec == "planes" and kind.planes and smallest_chunk_bytes >= LARGE_BYTES else 1


def _entry(name: str, kind: DType, shape: tuple[int, ...], size: int, plane_bytes: int) -> str:
    if plane_bytes > 1 or kind.safetensors is None:
        return header_entry(name, "U8", (size,))
    return header_entry(name, kind.safetensors, shape)


def _blocks(chunks: Sequence[Chunk]) -> Iterator[Block]:
    shared: list[Chunk] = []
    first = shared_bytes = 0
    for position, chunk in enumerate(chunks):
        size = chunk.raw_bytes
        if shared and (size >= LARGE_BYTES or shared_bytes + size > BLOCK_BYTES):
            yield _shared_block(shared, shared_bytes, range(first, position))
            shared, shared_bytes = [], 0
        if size >= LARGE_BYTES:
            for start in range(0, size, BLOCK_BYTES):
                piece = (chunk.arena_offset + start, min(BLOCK_BYTES, size - start))
                own = range(position, position + 1)
                yield Block(chunk.raw_offset + start, piece[1], chunk.plane_bytes, (piece,), own)
        elif size:
            first = first if shared else position
            shared.append(chunk)
            shared_bytes += size
    if shared:
        yield _shared_block(shared, shared_bytes, range(first, len(chunks)))


def _shared_block(shared: Sequence[Chunk], shared_bytes: int, positions: range) -> Block:
    pieces: list[tuple[int, int]] = []
    begin = end = shared[0].arena_offset
    for chunk in shared:
        if chunk.arena_offset != end:
            pieces.append((begin, end - begin))
            begin = chunk.arena_offset
        end = chunk.arena_offset + chunk.raw_bytes
    pieces.append((begin, end - begin))
    return Block(shared[0].raw_offset, shared_bytes, 1, tuple(pieces), positions)


def _align(offset: int, multiple: int) -> int:
    return -(-offset // multiple) * multiple
