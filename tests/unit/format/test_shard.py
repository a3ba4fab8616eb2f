"""The safetensors header: what the library reads, and what our validator refuses that it may not."""

import json
import struct

import pytest
import safetensors
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.errors import CheckpointError, CorruptCheckpointError, ResourceLimitError
from asyncckpt.format import limits
from asyncckpt.format.shard import HeaderTensor, build_header, header_entry, parse_header


def header_of(rows) -> bytes:
    text = rows if isinstance(rows, bytes) else json.dumps(rows).encode()
    return struct.pack("<Q", len(text)) + text


def row(dtype="U8", shape=(4,), offsets=(0, 4)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def test_a_header_comes_back_and_is_padded_to_eight_bytes():
    header = build_header([(header_entry("w", "F32", (2, 3)), 24), (header_entry("é", "U8", ()), 1)])
    assert len(header) % 8 == 0
    described = parse_header(header, len(header) + 25)
    assert list(described) == ["w", "é"]
    assert described["w"] == HeaderTensor("F32", (2, 3), len(header), 24)
    assert described["é"] == HeaderTensor("U8", (), len(header) + 24, 1)


@settings(max_examples=100, deadline=None)
@given(
    st.dictionaries(
        st.text(st.characters(exclude_categories=["Cs"])).filter(lambda name: name != "__metadata__"), st.integers(0, 9)
    )
)
def test_the_safetensors_library_reads_any_name(tensors):
    header = build_header((header_entry(name, "U8", (size,)), size) for name, size in tensors.items())
    data = header + bytes(sum(tensors.values()))
    assert {name: one.raw_bytes for name, one in parse_header(header, len(data)).items()} == tensors
    assert {name: len(found["data"]) for name, found in safetensors.deserialize(data)} == tensors


@pytest.mark.parametrize(
    "rows",
    [
        b"",
        b"[]",
        b"{",
        b"\xff",
        b'{"a": NaN}',
        b'{"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},"a":{"dtype":"U8","shape":[4],"data_offsets":[0,4]}}',
        {"a": 5},
        {"a": {"dtype": "U8"}},
        {"a": row() | {"more": 1}},
        {"a": row(dtype="U7")},
        {"a": row(dtype=8)},
        {"a": row(shape=[5])},
        {"a": row(shape=[-4])},
        {"a": row(shape=[4.0])},
        {"a": row(shape=[True, 4])},
        {"a": row(shape=[2**63])},
        {"a": row(shape=[1] * 65 + [4])},
        {"a": row(shape=[2**40] * 60)},
        {"a": row(offsets=[0])},
        {"a": row(offsets=[4, 0])},
        {"a": row(offsets=[-4, 0])},
        {"a": row(offsets=[0, 2**63])},
        {"a": row(offsets=[1, 5])},
        {"a": row(), "b": row()},
        {"a": row(), "b": row(offsets=[3, 7])},
        {"a": row(), "b": row(offsets=[5, 9])},
        {"a": row(), "b": row(offsets=[4, 8])},
        {},
    ],
)
def test_a_header_that_cannot_be_is_refused(rows):
    header = header_of(rows)
    with pytest.raises(CorruptCheckpointError):
        parse_header(header, len(header) + 4)


@pytest.mark.parametrize("length", [0, 1, 2**63, 2**64 - 1])
def test_a_wrong_length_is_refused(length):
    text = json.dumps({"a": row()}).encode()
    with pytest.raises(CorruptCheckpointError, match="length"):
        parse_header(struct.pack("<Q", length) + text, len(text) + 12)
    for short in (b"", b"1234567"):
        with pytest.raises(CorruptCheckpointError, match="length"):
            parse_header(short, 100)


def test_limits_hold(monkeypatch):
    with pytest.raises(ResourceLimitError):
        parse_header(header_of(b"[" * 100_000), 200_000)
    monkeypatch.setattr(limits, "TENSORS", 1)
    header = header_of({"a": row(), "b": row(offsets=[4, 8])})
    with pytest.raises(ResourceLimitError, match="2 tensors"):
        parse_header(header, len(header) + 8)
    monkeypatch.setattr(limits, "HEADER_BYTES", 10)
    with pytest.raises(ResourceLimitError, match="above 10"):
        parse_header(header, len(header) + 8)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_damage_never_escapes_the_error_family(data):
    header = bytearray(build_header([(header_entry("w", "F32", (2, 3)), 24), (header_entry("b", "U8", ()), 1)]))
    for _ in range(data.draw(st.integers(1, 4))):
        header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
    try:
        parse_header(bytes(header), len(header) + 25)
    except CheckpointError:
        return
