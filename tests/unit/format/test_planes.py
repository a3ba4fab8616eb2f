"""Planes that no code could make smaller are stored as they are, in frames that every zstd decoder reads."""

import subprocess

import numpy as np
import pytest
import zstandard

from asyncckpt.format import planes
from asyncckpt.format.frames import decode_frame, stored_frame
from tests.programs import needs_zstd

MIB = 2**20
rng = np.random.default_rng(0)


def bytes_of(values: np.ndarray, number: int) -> np.ndarray:
    return np.ascontiguousarray(values.view(np.uint8).reshape(-1, values.itemsize)[:, number])


def zstd_ratio(plane: np.ndarray) -> float:
    return len(zstandard.ZstdCompressor(level=1).compress(plane.tobytes())) / len(plane)


SIZES = [1, 2, 1000, 2**17 - 1, 2**17, 2**17 + 1, MIB, MIB + 5]


@pytest.mark.parametrize("size", SIZES)
def test_a_stored_frame_is_read_by_us_and_by_the_library(size):
    data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
    frame = stored_frame(memoryview(data))
    out = bytearray(size)
    decode_frame(frame, memoryview(out))
    assert out == data
    assert zstandard.get_frame_parameters(frame).content_size == size
    assert zstandard.ZstdDecompressor().decompress(frame) == data
    assert len(frame) <= size + 9 + 3 * (size // 2**17 + 1)


@needs_zstd
@pytest.mark.parametrize("size", SIZES)
def test_a_stored_frame_is_read_by_the_command(size):
    data = rng.integers(0, 256, size, dtype=np.uint8).tobytes()
    frame = bytes(stored_frame(memoryview(data)))
    assert subprocess.run(["zstd", "-dc"], input=frame, stdout=subprocess.PIPE, check=True).stdout == data


def test_the_low_bytes_of_weights_are_even_and_their_exponents_are_not():
    weights = (rng.standard_normal(MIB) * 0.02).astype(np.float32)
    assert [planes.is_even(bytes_of(weights, number)) for number in range(4)] == [True, True, True, False]


@pytest.mark.parametrize("seed", range(20))
def test_even_bytes_are_always_found_even(seed):
    assert planes.is_even(np.random.default_rng(seed).integers(0, 256, MIB, dtype=np.uint8))


@pytest.mark.parametrize(
    "plane",
    [
        np.zeros(MIB, np.uint8),
        np.concatenate([np.zeros(MIB // 16, np.uint8), rng.integers(0, 256, MIB - MIB // 16, dtype=np.uint8)]),
        np.where(np.arange(MIB) % 256 < 32, 0, rng.integers(0, 256, MIB)).astype(np.uint8),  # padded columns
        rng.integers(0, 128, MIB, dtype=np.uint8),
    ],
)
def test_what_zstd_makes_smaller_is_not_found_even(plane):
    assert zstd_ratio(plane) < 0.97
    assert not planes.is_even(plane)


def test_what_is_found_even_would_have_been_stored_by_zstd_too():
    for spread in np.linspace(0, 1.5, 40):
        weights = 1 + spread * rng.random(256)
        plane = rng.choice(256, MIB, p=weights / weights.sum()).astype(np.uint8)
        if planes.is_even(plane):
            assert zstd_ratio(plane) > 0.98


@pytest.mark.parametrize("size", [1, 5, 100, 4095, 4097])
def test_short_planes_are_judged_without_an_error(size):
    planes.is_even(np.zeros(size, np.uint8))
