"""Codecs alone, one thread, in memory: stored bytes of raw bytes, and the speed of both directions.

`planes` is this package's codec through `asyncckpt.format`, its digests included, as its workers run it. ZipNN runs with one thread
on the bytes of all tensors joined: its `HUFFMAN` method, as strong as its automatic choice and up to three times as fast.
`zstd-1` is zstd at level 1 on blocks of 1 MiB.
"""

import time
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
import zstandard

from asyncckpt.format.digest import Hasher
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import decode_block, encode_shard
from asyncckpt.format.plan import Group, Structure, TensorSpec, plan
from benchmarks.measure import Observer, Spread, spread
from benchmarks.results import Result
from benchmarks.scenarios.base import BitsDifferError, Run, judged
from benchmarks.scenarios.samples import FOREIGN_CORES, described
from benchmarks.states import State, build

ZSTD_BLOCK_BYTES = 2**20


class _Codec(ABC):
    def ready(self) -> None:  # noqa: B027 - most need nothing
        """Before each `encode`, outside of all timing."""

    @abstractmethod
    def encode(self) -> int:
        """Stored bytes."""

    @abstractmethod
    def decode(self) -> None:
        """Decode what was encoded last."""

    @abstractmethod
    def same(self) -> bool:
        """What was decoded is what was given."""


class _Planes(_Codec):
    def __init__(self, tensors: list[np.ndarray], dtype: str) -> None:
        element_bytes = DTYPES[dtype].element_bytes
        specs = tuple(TensorSpec(0, f"{n:04d}", dtype, (t.size // element_bytes,)) for n, t in enumerate(tensors))
        self._plan = plan(Structure((Group("state", "state"),), specs, (), {"dict": {}}))
        self._arena = memoryview(bytearray(self._plan.arena_bytes))
        for offset, tensor in zip(self._plan.tensor_offsets, tensors, strict=True):
            self._arena[offset : offset + tensor.size] = tensor
        self._frames: list[list[bytes]] = []
        self._out = [memoryview(bytearray(shard.raw_bytes)) for shard in self._plan.shards]
        self._raw = b"".join(t.data for t in tensors)

    def encode(self) -> int:
        table = self._arena[self._plan.digests_offset :]
        self._frames = []
        for shard in self._plan.shards:
            frames = encode_shard(shard, self._arena, self._plan.codec, table)
            self._frames.append([bytes(frame.data) for frame in frames])
        return sum(len(frame) for frames in self._frames for frame in frames)

    def decode(self) -> None:
        for shard, frames, out in zip(self._plan.shards, self._frames, self._out, strict=True):
            at = 1  # the first holds the header
            for block in shard.blocks:
                part = out[block.raw_offset : block.raw_offset + block.raw_bytes]
                decode_block(frames[at : at + block.plane_bytes], block.plane_bytes, block.raw_bytes, part)
                at += block.plane_bytes
                Hasher().update(part)

    def same(self) -> bool:
        pairs = zip(self._plan.shards, self._out, strict=True)
        chunks = [(chunk, out) for shard, out in pairs for chunk in shard.chunks]
        chunks.sort(key=lambda pair: (pair[0].tensor, pair[0].offsets))
        return b"".join(out[c.raw_offset : c.raw_offset + c.raw_bytes] for c, out in chunks) == self._raw


class _ZipNN(_Codec):
    def __init__(self, tensors: list[np.ndarray], dtype: str) -> None:
        import zipnn

        self._zipnn = zipnn.ZipNN(method="HUFFMAN", input_format="byte", bytearray_dtype=dtype, threads=1)
        self._raw = b"".join(t.data for t in tensors)
        self._found: Any = None

    def ready(self) -> None:
        self._work = bytearray(self._raw)  # it works in place

    def encode(self) -> int:
        self._stored = self._zipnn.compress(self._work)
        return len(self._stored)

    def decode(self) -> None:
        self._found = self._zipnn.decompress(self._stored)

    def same(self) -> bool:
        return self._found == self._raw


class _Zstd(_Codec):
    def __init__(self, tensors: list[np.ndarray], _dtype: str) -> None:
        self._raw = memoryview(b"".join(t.data for t in tensors))
        self._compressor = zstandard.ZstdCompressor(level=1)
        self._decompressor = zstandard.ZstdDecompressor()
        self._stored: list[bytes] = []
        self._found: list[bytes] = []

    def encode(self) -> int:
        blocks = range(0, len(self._raw), ZSTD_BLOCK_BYTES)
        self._stored = [self._compressor.compress(self._raw[at : at + ZSTD_BLOCK_BYTES]) for at in blocks]
        return sum(map(len, self._stored))

    def decode(self) -> None:
        self._found = [self._decompressor.decompress(frame) for frame in self._stored]

    def same(self) -> bool:
        return b"".join(self._found) == self._raw


CODECS: dict[str, type[_Codec]] = {"asyncckpt": _Planes, "zipnn": _ZipNN, "zstd-1": _Zstd}


def run(context: Run) -> list[Result]:
    """The scenario's peers are codecs; nothing is stored."""
    found = []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for spec in context.scenario.states:
            state = build(spec)
            results = [
                context.result(spec, state, name, **_one(context, state, spec.dtype, name))
                for name in context.scenario.peers
            ]
            found += judged(results, context.scenario.goals)
    finally:
        torch.set_num_threads(threads)
    return found


def _one(context: Run, state: State, dtype: str, name: str) -> dict[str, Any]:
    """Measures, or the error of a codec that is not installed or cannot go on."""
    try:
        return {"measures": _measured(context, state, dtype, name)}
    except BitsDifferError:
        raise
    except Exception as error:
        context.warn(name, described(error))
        return {"measures": {}, "error": described(error)}


def _measured(context: Run, state: State, dtype: str, name: str) -> dict[str, Spread | float]:
    tensors = [t.contiguous().view(-1).view(torch.uint8).numpy() for t in state.tensors() if t.numel() > 1]
    raw_bytes = sum(t.size for t in tensors)
    codec = CODECS[name](tensors, dtype)
    rates: list[tuple[float, float, float]] = []
    stored_bytes = 0
    for number in range(context.scenario.rounds + 1):
        codec.ready()
        context.warm(state)
        observer = Observer()
        started = time.perf_counter()
        stored_bytes = codec.encode()
        encode_s = time.perf_counter() - started
        started = time.perf_counter()
        codec.decode()
        decode_s = time.perf_counter() - started
        foreign_cores = observer.stop().foreign_cores
        if not codec.same():
            raise BitsDifferError(f"{name} did not give back what it was given")
        if number:
            rates.append((raw_bytes / 1e9 / encode_s, raw_bytes / 1e9 / decode_s, foreign_cores))
    kept = [rate for rate in rates if rate[2] <= FOREIGN_CORES] or rates
    encode = spread(rate[0] for rate in kept)
    context.say(name, context.scenario.rounds, f"encode {encode.median:.2f} GB/s")
    return {
        "encode_gb_per_s": encode,
        "decode_gb_per_s": spread(rate[1] for rate in kept),
        "stored_bytes": float(stored_bytes),
        "stored_ratio": stored_bytes / raw_bytes,
        "dropped": float(len(rates) - len(kept)),
        "foreign_cores": max(rate[2] for rate in kept),
    }
