"""Checkpoints whose tensors are stored in boxes of any kind, as later writers may make them: for tests of what reads."""

import random
from collections.abc import Mapping, Sequence

import numpy as np
import zstandard

from asyncckpt.format import keys
from asyncckpt.format.box import Box
from asyncckpt.format.digest import digest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.index import FrameTable, Index, IndexedChunk, IndexedShard, IndexedTensor
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.format.plan import LARGE_BYTES
from asyncckpt.format.structure import Group
from asyncckpt.store.base import Store

HEADER = b"a header of a shard, which no fetch reads"
FOLDER = keys.folder(7, "0a1b2c3d-1")


def partition(shape: Sequence[int], seed: int, count: int) -> list[Box]:
    """At most so many boxes that hold each element once, by cutting boxes at random; then some are joined across the cuts, like a whirl."""
    source = random.Random(seed)
    boxes: list[Box] = [((0,) * len(shape), tuple(shape))]
    while len(boxes) < count:
        wide = [box for box in boxes if max(box[1], default=1) > 1]
        if not wide:
            break
        box = source.choice(wide)
        boxes.remove(box)
        axis = source.choice([axis for axis, size in enumerate(box[1]) if size > 1])
        if len(shape) > 1 and source.random() < 0.3 and (whirl := _whirl(box, source)):
            boxes += whirl
            continue
        at = source.randrange(1, box[1][axis])
        boxes += [_narrowed(box, axis, 0, at), _narrowed(box, axis, at, box[1][axis] - at)]
    return sorted(boxes)


def _narrowed(box: Box, axis: int, start: int, size: int) -> Box:
    offsets, sizes = list(box[0]), list(box[1])
    offsets[axis] += start
    sizes[axis] = size
    return tuple(offsets), tuple(sizes)


def _whirl(box: Box, source: random.Random) -> list[Box]:
    """Five boxes that no straight cut separates, in two dimensions of this one."""
    wide = [axis for axis, size in enumerate(box[1]) if size >= 3]
    if len(wide) < 2:
        return []
    one, other = source.sample(wide, 2)
    a, b = sorted(source.sample(range(1, box[1][one]), 2))
    c, d = sorted(source.sample(range(1, box[1][other]), 2))
    height, width = box[1][one], box[1][other]
    rows = [
        (0, b, 0, c),
        (b, height - b, 0, d),
        (a, height - a, d, width - d),
        (0, a, c, width - c),
        (a, b - a, c, d - c),
    ]
    return [_narrowed(_narrowed(box, one, top, tall), other, left, wide) for top, tall, left, wide in rows]


def store_boxes(
    store: Store, codec: str, tensors: Mapping[str, tuple[str, np.ndarray, list[Box]]], *, twice: bool = False
) -> Index:
    """One shard of tensors, each given as dtype, elements in bytes (the last dimension), and boxes. `twice`: equal bytes stand once."""
    chunks, known = [], {}
    data = bytearray(HEADER)
    found = {}
    blocks: list[tuple[bytes, int]] = [(HEADER, 1)]
    shared = b""
    for name, (dtype, values, boxes) in tensors.items():
        kind = DTYPES[dtype]
        plains = [_plain(values, box) for box in boxes]
        planes = codec == "planes" and kind.planes and all(len(plain) >= LARGE_BYTES for plain in plains)
        chunks = []
        for box, plain in zip(boxes, plains, strict=True):
            digests = b"".join(digest(plain[at : at + BLOCK_BYTES]) for at in range(0, len(plain), BLOCK_BYTES))
            place = (plain, planes, kind.element_bytes)
            start = known.get(place) if twice else None
            if start is None:
                start = known[place] = len(data)
                data += plain
                if shared and (len(plain) >= LARGE_BYTES or len(shared) + len(plain) > BLOCK_BYTES):
                    blocks.append((shared, 1))
                    shared = b""
                if len(plain) >= LARGE_BYTES:
                    pieces = (plain[at : at + BLOCK_BYTES] for at in range(0, len(plain), BLOCK_BYTES))
                    blocks += [(piece, kind.element_bytes if planes else 1) for piece in pieces]
                else:
                    shared += plain
            chunks.append(IndexedChunk(*box, 0, start, len(plain), digests or digest()))
        path = f"m/{name}"
        layout = "planes" if planes else "plain"
        found[path] = IndexedTensor(0, name, path, dtype, values.shape[:-1], layout, tuple(chunks))
    if shared:
        blocks.append((shared, 1))
    stored, frames = bytes(data), []
    if codec != "none":
        raw = [
            row.tobytes() for block, planes in blocks for row in np.frombuffer(block, np.uint8).reshape(-1, planes).T
        ]
        packed = [zstandard.ZstdCompressor(level=1).compress(part) for part in raw]
        stored = b"".join(packed)
        frames = [(len(one), len(other)) for one, other in zip(raw, packed, strict=True)]
    key = f"{FOLDER}m-00001-of-00001.safetensors"
    store.put(key, [stored])
    shard = IndexedShard(key, len(data), len(stored), FrameTable.of(frames), digest(HEADER))
    return Index(codec, (Group("m", "m"),), found, {}, (shard,), {"dict": {}})  # type: ignore[arg-type]


def _plain(values: np.ndarray, box: Box) -> bytes:
    return values[tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))].tobytes()
