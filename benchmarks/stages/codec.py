"""What encoding and decoding cost, whole and in parts, on the thread that calls."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

from asyncckpt.format import planes
from asyncckpt.format.digest import Buffer, Hasher
from asyncckpt.format.frames import Encoder, decode_block, decode_frame, encode_shard
from asyncckpt.format.plan import BLOCK_BYTES, Block, Plan
from benchmarks.stages.base import Bench, Limit, Stage, total
from benchmarks.trained import trained

PARTS = "Codec, in parts, one thread"
PLANES = "Planes of trained values, zstd, one thread"
WHOLE = "Codec, whole, one thread"
_SAMPLE_BYTES = 128 * 2**20  # of planes kept beside the state
_ZSTD_BLOCK_BYTES = 2**17
_PLANES_BYTES = 64 * 2**20  # what one plane is repeated to
_SPARE = np.empty(planes.SPARE_BYTES, np.uint8)


def parts(bench: Bench, plan: Plan, arena: memoryview, memcpy: Stage, read: Stage) -> dict[str, Stage]:
    """Digest, split and merge alone, and zstd of planes that are split already."""
    blocks = [block for shard in plan.shards for block in shard.blocks]
    large = [block for block in blocks if block.plane_bytes > 1]
    size = sum(block.raw_bytes for block in large)
    every = max(1, size // _SAMPLE_BYTES)
    sample = [_split(block, arena) for block in large[::every]]
    sample_bytes = sum(piece.nbytes for pieces in sample for piece in pieces)
    compressor = Encoder("planes")._compressor
    coded = [[compressor.compress(piece) for piece in pieces] for pieces in sample]
    source = np.frombuffer(arena, np.uint8, size // 8 * 8)  # any values: neither split nor merge looks at them
    scratch = np.empty(BLOCK_BYTES, np.uint8)

    def digest_all() -> None:
        hasher = Hasher()
        for block in blocks:
            for offset, count in block.pieces:
                hasher.update(arena[offset : offset + count])

    def all_pieces(change, element_bytes: int) -> None:
        for start in range(0, len(source), BLOCK_BYTES):
            piece = source[start : start + BLOCK_BYTES]
            change(piece, element_bytes, scratch[: len(piece)], _SPARE)

    def compress_all() -> None:
        for pieces in sample:
            for piece in pieces:
                compressor.compress(piece)

    def decompress_all() -> None:
        for frames, pieces in zip(coded, sample, strict=True):
            for frame, piece in zip(frames, pieces, strict=True):
                decode_frame(frame, memoryview(scratch)[: len(piece)])

    copy = memcpy.as_limit()
    return {
        "blake3": bench.stage(PARTS, "BLAKE3", digest_all, state_bytes=plan.data_bytes, limit=read.as_limit()),
        "split4": bench.stage(PARTS, "split into planes, fp32", lambda: all_pieces(planes.split, 4), limit=copy),
        "split2": bench.stage(PARTS, "split into planes, bf16", lambda: all_pieces(planes.split, 2), limit=copy),
        "zstd": bench.stage(PARTS, "zstd of split planes", compress_all, state_bytes=sample_bytes, limit=copy),
        "unzstd": bench.stage(PARTS, "zstd back to planes", decompress_all, state_bytes=sample_bytes, limit=copy),
        "merge4": bench.stage(PARTS, "merge planes, fp32", lambda: all_pieces(planes.merge, 4), limit=copy),
        "merge2": bench.stage(PARTS, "merge planes, bf16", lambda: all_pieces(planes.merge, 2), limit=copy),
    }


def _split(block: Block, arena: memoryview) -> list[np.ndarray]:
    offset, size = block.pieces[0]
    out = np.empty(size, np.uint8)
    planes.split(np.frombuffer(arena, np.uint8, size, offset), block.plane_bytes, out, _SPARE)
    return list(out.reshape(block.plane_bytes, -1))


def of_planes(bench: Bench, memcpy: Stage) -> Iterator[Stage]:
    """Ratio and speed of every plane: of weights and moments in fp32, and of weights in bf16."""
    source = trained()
    parameters = list(source.model.parameters())
    kinds = {"weights fp32": [p.detach() for p in parameters]}
    for moment in ("exp_avg", "exp_avg_sq"):
        kinds[f"{moment} fp32"] = [source.optimizer.state[p][moment] for p in parameters]
    kinds["weights bf16"] = [p.detach().bfloat16() for p in parameters]
    compressor = Encoder("planes")._compressor
    for kind, tensors in kinds.items():
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        element_bytes = flat.element_size()
        split = np.empty(flat.nbytes, np.uint8)
        planes.split(flat.view(torch.uint8).numpy(), element_bytes, split, _SPARE)
        for number, plane in enumerate(split.reshape(element_bytes, -1)):
            piece_bytes = BLOCK_BYTES // element_bytes
            pieces = [plane[start : start + piece_bytes] for start in range(0, len(plane), piece_bytes)]
            times = max(1, _PLANES_BYTES // len(plane))

            def compress(pieces: Sequence[np.ndarray] = pieces, times: int = times) -> None:
                for _ in range(times):
                    for piece in pieces:
                        compressor.compress(piece)

            size = times * len(plane)
            elapsed_s, cpu_s = bench.time(lambda _: compress(), lambda: None)
            ratio = sum(len(compressor.compress(piece)) for piece in pieces) / len(plane)
            floor = sum(_entropy_bytes(piece) for piece in pieces) / len(plane)
            name = f"{kind}, byte {number}{' (sign, exponent)' if number == element_bytes - 1 else ''}"
            yield Stage(PLANES, name, size, size, elapsed_s, cpu_s, memcpy.as_limit(), ratio, floor)


def _entropy_bytes(piece: np.ndarray) -> float:
    """Least bytes if each zstd block has a code of its own that gives every byte value a length, and looks at nothing else."""
    least = 0.0
    for start in range(0, len(piece), _ZSTD_BLOCK_BYTES):
        block = piece[start : start + _ZSTD_BLOCK_BYTES]
        share = np.bincount(block, minlength=256) / len(block)
        share = share[share > 0]
        least -= float((share * np.log2(share)).sum()) * len(block) / 8
    return least


def whole(
    bench: Bench, plans: dict[str, Plan], arena: memoryview, known: dict[str, Stage]
) -> tuple[list[Stage], list[list[Buffer]]]:
    """Encoding of all shards by each codec, and decoding of what `planes` made; the latter's stored buffers of each shard."""
    found = []
    stored: list[list[Buffer]] = []
    for codec, plan in plans.items():
        digests = arena[plan.digests_offset :]

        def encode(plan: Plan = plan, digests: memoryview = digests) -> None:
            for shard in plan.shards:
                for _ in encode_shard(shard, arena, plan.codec, digests):
                    pass  # dropped at once: kept frames would need new pages

        limit = _encode_limit(codec, known)
        elapsed_s, cpu_s = bench.time(lambda _: encode(), lambda: None)
        made = [[f.data for f in encode_shard(shard, arena, plan.codec, digests)] for shard in plan.shards]
        moved = sum(len(data) for buffers in made for data in buffers)
        raw = plan.data_bytes
        found.append(Stage(WHOLE, f"encode, codec {codec}", raw, raw, elapsed_s, cpu_s, limit, moved / raw))
        if codec == "planes":
            stored = made
        del made
    found.append(_decode(bench, plans["planes"], stored, known))
    return found, stored


def _encode_limit(codec: str, known: dict[str, Stage]) -> Limit:
    if codec == "planes":
        return total("BLAKE3 + split + zstd", known["blake3"], known["split4"], known["zstd"])
    return known["blake3"].as_limit()


def _decode(bench: Bench, plan: Plan, stored: list[list[Buffer]], known: dict[str, Stage]) -> Stage:
    out = memoryview(bytearray(BLOCK_BYTES))

    def decode() -> None:
        for shard, buffers in zip(plan.shards, stored, strict=True):
            frames = iter(buffers[1:])  # the first is the header
            for block in shard.blocks:
                ours = [next(frames) for _ in range(block.plane_bytes)]
                decode_block(ours, block.plane_bytes, block.raw_bytes, out[: block.raw_bytes])

    limit = total("zstd + merge", known["unzstd"], known["merge4"])
    return bench.stage(WHOLE, "decode, codec planes, no digest", decode, state_bytes=plan.data_bytes, limit=limit)
