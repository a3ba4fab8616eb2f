"""The body of a put: a file over buffers that copies nothing large."""

import hashlib
import io

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asyncckpt.store.s3_client import _PIECE_BYTES, Body, body_of

SIZES = st.lists(st.sampled_from([0, 1, 7, 1000, 2**16 - 1, 2**16, 2**16 + 1, 300_000]), max_size=8)


def nothing() -> None:
    pass


def buffers_of(sizes: list[int]) -> list[bytes]:
    return [bytes([number + 1]) * size for number, size in enumerate(sizes)]


@given(sizes=SIZES, asked=st.sampled_from([1, 16_384, 2**18, 2**20]), start=st.integers(0, 400_000))
def test_a_body_reads_like_the_joined_bytes(sizes: list[int], asked: int, start: int) -> None:
    buffers = buffers_of(sizes)
    whole = b"".join(buffers)
    body = Body(buffers, nothing)
    assert len(body) == len(whole)
    assert body.seek(start) == min(start, len(whole))
    pieces = list(iter(lambda: body.read(asked), b""))
    assert b"".join(pieces) == whole[start:]
    assert all(0 < len(piece) <= max(asked, _PIECE_BYTES) for piece in pieces)
    assert body.tell() == len(whole)
    body.seek(0)
    assert body.read() == whole


def test_seeking_goes_from_any_end() -> None:
    body = Body([b"abc", b"defg"], nothing)
    assert body.seek(-2, io.SEEK_END) == 5
    assert body.read() == b"fg"
    assert body.seek(-5, io.SEEK_CUR) == 2
    assert bytes(body.read(1)) == b"cdefg"


def test_a_large_buffer_is_sent_without_a_copy() -> None:
    source = bytearray(2**20)
    body = Body([source], nothing)
    piece = body.read(16_384)
    source[0] = 7
    assert isinstance(piece, memoryview)
    assert piece[0] == 7


def test_small_neighbours_travel_together() -> None:
    body = Body([b"x" * 10] * 1000 + [bytes(2**17)], nothing)
    assert [len(piece) for piece in iter(lambda: body.read(1), b"")] == [10_000, 2**17]


def test_a_body_can_be_hashed_by_pieces() -> None:
    buffers = buffers_of([100_000, 5, 200_000])
    body = Body(buffers, nothing)
    found = hashlib.sha256()
    while piece := body.read(1024):
        found.update(piece)
    assert found.digest() == hashlib.sha256(b"".join(buffers)).digest()


@pytest.mark.parametrize(("size", "kind"), [(0, bytes), (2**16, bytes), (2**16 + 1, Body)])
def test_only_a_large_body_is_a_file(size: int, kind: type) -> None:
    assert type(body_of([bytes(size)], nothing)) is kind


@given(sizes=SIZES, asked=st.sampled_from([1000, 16_384, 2**18, 2**21]), start=st.integers(0, 400_000))
def test_a_body_fills_what_it_is_given_and_no_more(sizes: list[int], asked: int, start: int) -> None:
    """The signer of awscrt, which botocore uses where it is installed, reads so."""
    whole = b"".join(buffers_of(sizes))
    body = Body(buffers_of(sizes), nothing)
    body.seek(start)
    found = bytearray()
    target = bytearray(asked)
    while count := body.readinto(target):
        assert count == min(asked, len(whole) - start - len(found))
        found += target[:count]
    assert bytes(found) == whole[start:]
    assert body.tell() == len(whole)
