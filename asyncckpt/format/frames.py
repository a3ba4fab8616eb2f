"""Blocks to zstd frames and back. The one file that imports zstandard.

Encoding is one pass: a block is digested, gathered or split into planes, and compressed while it is in the cache.
"""

import mmap
import struct
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import zstandard

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError
from asyncckpt.format import planes
from asyncckpt.format.digest import DIGEST_BYTES, Buffer, Hasher, digest
from asyncckpt.format.plan import BLOCK_BYTES, Block, Chunk, ShardPlan, StoredCodec

MAX_WINDOW_BYTES = 128 * 2**20
HEADER_WINDOW_BYTES = 8 * 2**20
"""RFC 8878, 3.1.1.1.2, asks every decoder for as much; zstd's level 3 takes 2 MiB."""

# strategy=fast with a tiny hash table and long matches: Huffman coding and little else. Measured on fp32 and bf16 weights
# and AdamW state: within 0.1 % of the order-0 entropy of the planes, at twice the speed of level 1.
_BLOCK_PARAMETERS = {
    "compression_level": 1,
    "strategy": zstandard.STRATEGY_FAST,
    "window_log": 20,
    "hash_log": 6,
    "min_match": 7,
    "target_length": 0,
    "write_content_size": 1,
    "write_checksum": 0,  # BLAKE3 covers the bytes
    "write_dict_id": 0,
}
_TEXT_LEVEL = 3
_FRAME_HEADER = struct.Struct("<IBI")  # magic number, descriptor, content size
_MAGIC = 0xFD2FB528
_SINGLE_SEGMENT_4 = 0b10_1_00_0_00  # the content's size in four bytes, no window, no checksum, no dictionary
_RAW_BLOCK_BYTES = 128 * 2**10  # the most that a block may hold
_BORROW_BYTES = 64 * 2**10  # codec none: pieces from this size on are sent from the arena, smaller ones are joined


@dataclass(frozen=True, slots=True)
class Frame:
    """Bytes to store, in order. `raw_bytes`: how much of the safetensors stream they hold.

    `data` may be a view of the arena (codec none).
    """

    raw_bytes: int
    data: Buffer


class Encoder:
    """Compressor and scratch memory of one thread."""

    def __init__(self, codec: StoredCodec) -> None:
        self.codec = codec
        parameters = zstandard.ZstdCompressionParameters(**_BLOCK_PARAMETERS)
        self._compressor = zstandard.ZstdCompressor(compression_params=parameters)
        self._scratch = memoryview(bytearray(BLOCK_BYTES))
        self._spare = np.empty(planes.SPARE_BYTES, np.uint8)

    def encode_header(self, header: bytes) -> Buffer:
        """The header as it is stored."""
        return header if self.codec == "none" else compress(header)

    def encode_block(self, block: Block, arena: memoryview) -> tuple[list[Buffer], list[int]]:
        """The block as it is stored, in one or more buffers, and how many raw bytes each holds."""
        if self.codec == "none":
            return self._borrow(block, arena)
        if block.plane_bytes == 1:
            return [self._compressor.compress(self._gather(block, arena))], [block.raw_bytes]
        offset, size = block.pieces[0]
        split = self._scratch[:size]
        source = np.frombuffer(arena, np.uint8, size, offset)
        planes.split(source, block.plane_bytes, np.frombuffer(split, np.uint8), self._spare)
        plane = size // block.plane_bytes
        frames: list[Buffer] = []
        for number in range(block.plane_bytes):
            data = split[number * plane : (number + 1) * plane]
            # the lowest bytes are noise that zstd passes over at once; the one below the exponent is often so nearly even that it
            # builds a code, finds that it saves too little, and stores the bytes after all
            even = number == block.plane_bytes - 2 and planes.is_even(np.frombuffer(data, np.uint8))
            frames.append(stored_frame(data) if even else self._compressor.compress(data))
        return frames, [plane] * block.plane_bytes

    def _gather(self, block: Block, arena: memoryview) -> memoryview:
        if len(block.pieces) == 1:
            offset, size = block.pieces[0]
            return arena[offset : offset + size]
        target, position = self._scratch, 0
        for offset, size in block.pieces:
            target[position : position + size] = arena[offset : offset + size]
            position += size
        return target[:position]

    def _borrow(self, block: Block, arena: memoryview) -> tuple[list[Buffer], list[int]]:
        if len(block.pieces) == 1 and block.raw_bytes >= _BORROW_BYTES:
            offset, size = block.pieces[0]
            return [arena[offset : offset + size]], [size]
        return [bytes(self._gather(block, arena))], [block.raw_bytes]


_of_thread = threading.local()


def encoder(codec: StoredCodec) -> Encoder:
    """The calling thread's encoder."""
    found: Encoder | None = getattr(_of_thread, codec, None)
    if found is None:
        found = Encoder(codec)
        setattr(_of_thread, codec, found)
    return found


def encode_shard(
    shard: ShardPlan, arena: memoryview, codec: StoredCodec, digests: memoryview | None
) -> Iterator[Frame]:
    """The shard's frames, header first. The digest of each piece of a chunk's plain bytes is written to the table `digests`.

    All frames must be taken by the thread that took the first.
    """
    encode = encoder(codec)
    yield Frame(len(shard.header), encode.encode_header(shard.header))
    if digests is not None:
        for chunk in shard.chunks:
            if not chunk.raw_bytes:
                _write_digest(digests, chunk.first_piece, digest())
    for block in shard.blocks:
        if digests is not None:
            _digest_block(block, shard.chunks, arena, digests)
        for data, raw_bytes in zip(*encode.encode_block(block, arena), strict=True):
            yield Frame(raw_bytes, data)


def _digest_block(block: Block, chunks: Sequence[Chunk], arena: memoryview, digests: memoryview) -> None:
    """A block holds one piece of a large chunk, or small chunks of one piece each."""
    first = chunks[block.chunks.start]
    if block.raw_bytes < first.raw_bytes:
        offset, size = block.pieces[0]
        piece = first.first_piece + (block.raw_offset - first.raw_offset) // BLOCK_BYTES
        _write_digest(digests, piece, digest(arena[offset : offset + size]))
        return
    for position in block.chunks:
        chunk = chunks[position]
        if chunk.raw_bytes:
            data = arena[chunk.arena_offset : chunk.arena_offset + chunk.raw_bytes]
            _write_digest(digests, chunk.first_piece, digest(data))


def _write_digest(digests: memoryview, piece: int, value: bytes) -> None:
    start = piece * DIGEST_BYTES
    digests[start : start + DIGEST_BYTES] = value


def stored_frame(data: memoryview) -> bytes:
    """A zstd frame that states its size and holds the bytes as they are (RFC 8878, 3.1.1: single segment, raw blocks)."""
    size = len(data)
    parts: list[Buffer] = [_FRAME_HEADER.pack(_MAGIC, _SINGLE_SEGMENT_4, size)]
    for start in range(0, size, _RAW_BLOCK_BYTES):
        block = data[start : start + _RAW_BLOCK_BYTES]
        last = start + len(block) == size
        parts += ((len(block) << 3 | last).to_bytes(3, "little"), block)
    return b"".join(parts)


def decode_frame(data: Buffer, out: memoryview) -> None:
    """Fill `out` from exactly one frame.

    A frame that states another size, is cut short, or is followed by anything raises `CorruptCheckpointError`; nothing is
    allocated by what a frame states.
    """
    if _frame_bytes(data, len(out)) != len(data):
        raise CorruptCheckpointError("a zstd frame of the wrong length")
    try:
        # one call over the whole frame with room for all of it: decoded straight into `out`, no window is allocated
        with _decompressor().stream_reader(data, closefd=False) as reader:
            count = reader.readinto(out) if len(out) else 0
            excess = reader.read(1)
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"a damaged zstd frame: {error}") from error
    if count != len(out) or excess:
        raise CorruptCheckpointError("a zstd frame that holds another number of bytes than it states")


def digest_of_frame(data: Buffer, raw_bytes: int) -> bytes:
    """The digest of what `decode_frame` would fill memory with, holding little of it: what is stored in few bytes may state many.

    `ResourceLimitError` for a window that would hold it all the same.
    """
    if _frame_bytes(data, raw_bytes) != len(data):
        raise CorruptCheckpointError("a zstd frame of the wrong length")
    if zstandard.get_frame_parameters(data).window_size > HEADER_WINDOW_BYTES:
        raise ResourceLimitError(f"a zstd frame whose window is above {HEADER_WINDOW_BYTES}")
    hasher = Hasher()
    piece = memoryview(bytearray(min(raw_bytes, BLOCK_BYTES)))
    try:
        with _decompressor().stream_reader(data, closefd=False) as reader:
            while count := reader.readinto(piece):
                hasher.update(piece[:count])
    except zstandard.ZstdError as error:
        raise CorruptCheckpointError(f"a damaged zstd frame: {error}") from error
    return hasher.digest()


def decode_block(frames: Sequence[Buffer], plane_bytes: int, raw_bytes: int, out: memoryview) -> None:
    """Mirror of `Encoder.encode_block` for the codecs with frames: one frame per plane, or one in all."""
    if len(out) != raw_bytes or len(frames) != plane_bytes or raw_bytes % plane_bytes:
        raise CorruptCheckpointError(f"a block of {raw_bytes} bytes in {len(frames)} frames cannot be")
    if plane_bytes == 1:
        decode_frame(frames[0], out)
        return
    if plane_bytes not in planes.ELEMENT_BYTES or raw_bytes > BLOCK_BYTES:
        raise CorruptCheckpointError(f"a block of {raw_bytes} bytes in {plane_bytes} planes cannot be")
    scratch = _scratch()
    plane = raw_bytes // plane_bytes
    for number, frame in enumerate(frames):
        decode_frame(frame, scratch[number * plane : (number + 1) * plane])
    spare = np.frombuffer(scratch, np.uint8, planes.SPARE_BYTES, BLOCK_BYTES)
    planes.merge(np.frombuffer(scratch, np.uint8, raw_bytes), plane_bytes, np.frombuffer(out, np.uint8), spare)


def compress(data: bytes) -> bytes:
    """One frame, for headers and the index."""
    found: zstandard.ZstdCompressor | None = getattr(_of_thread, "text", None)
    if found is None:
        found = _of_thread.text = zstandard.ZstdCompressor(level=_TEXT_LEVEL)
    return found.compress(data)


def decompress(data: Buffer, max_bytes: int) -> bytes:
    """Mirror of `compress`; `ResourceLimitError` if the frame states more than `max_bytes`."""
    size = _stated_bytes(data)
    if size > max_bytes:
        raise ResourceLimitError(f"a zstd frame states {size} bytes, above the limit of {max_bytes}")
    out = bytearray(size)
    decode_frame(data, memoryview(out))
    return bytes(out)


def _decompressor() -> zstandard.ZstdDecompressor:
    found: zstandard.ZstdDecompressor | None = getattr(_of_thread, "decompressor", None)
    if found is None:
        found = _of_thread.decompressor = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
    return found


def _scratch() -> memoryview:
    found: memoryview | None = getattr(_of_thread, "scratch", None)
    if found is None:
        # a map, not malloc's: restores run on new threads each, and glibc keeps in a thread's arena what was freed there
        memory = mmap.mmap(-1, BLOCK_BYTES + planes.SPARE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        found = _of_thread.scratch = memoryview(memory)
    return found


def _stated_bytes(data: Buffer) -> int:
    try:
        parameters = zstandard.get_frame_parameters(data)
    except (zstandard.ZstdError, ValueError) as error:
        raise CorruptCheckpointError(f"not a zstd frame: {error}") from error
    if parameters.content_size in (zstandard.CONTENTSIZE_UNKNOWN, zstandard.CONTENTSIZE_ERROR):
        raise CorruptCheckpointError("a zstd frame that does not state its size")
    if parameters.dict_id:
        raise CorruptCheckpointError("a zstd frame that needs a dictionary")
    if parameters.window_size > max(MAX_WINDOW_BYTES, parameters.content_size):
        raise ResourceLimitError(f"a zstd frame with a window of {parameters.window_size} bytes")
    return int(parameters.content_size)


def _frame_bytes(data: Buffer, expected_bytes: int) -> int:
    """Where the frame ends, by its block headers (RFC 8878, 3.1.1.2)."""
    stated = _stated_bytes(data)
    if stated != expected_bytes:
        raise CorruptCheckpointError(f"a zstd frame states {stated} bytes where {expected_bytes} are expected")
    position = zstandard.frame_header_size(data)
    total, last = len(data), False
    while not last and position + 3 <= total:
        header = data[position] | data[position + 1] << 8 | data[position + 2] << 16
        last = bool(header & 1)
        position += 3 + (1 if header >> 1 & 3 == 1 else header >> 3)  # type 1 repeats one byte
    if not last:
        raise CorruptCheckpointError("a zstd frame that is cut short")
    return position + (4 if zstandard.get_frame_parameters(data).has_checksum else 0)
