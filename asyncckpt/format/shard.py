"""The safetensors header of a shard: built fast, and read by a validator of our own.

The safetensors library checks neither duplicate names nor what a name is; a shard is read only after `parse_header`.
"""

import math
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from typing import Any

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError
from asyncckpt.format import limits, strict_json

METADATA = '"__metadata__":{"format":"pt","asyncckpt":"1"}'
"""`format` is what the transformers library asks of a file that PyTorch wrote."""

_LENGTH = struct.Struct("<Q")
_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class HeaderTensor:
    """One tensor of a header. `raw_offset`: from byte 0 of the safetensors stream."""

    dtype: str
    shape: tuple[int, ...]
    raw_offset: int
    raw_bytes: int


def header_entry(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """One tensor's line, open at its end for the offsets that `build_header` adds."""
    dimensions = ",".join(map(str, shape))
    return f'{encode_basestring_ascii(name)}:{{"dtype":"{dtype}","shape":[{dimensions}],"data_offsets":['


def build_header(entries: Iterable[tuple[str, int]]) -> bytes:
    """The bytes before the data, from lines and sizes in the order of the data. Padded with spaces to 8 bytes."""
    lines = [METADATA]
    offset = 0
    for entry, size in entries:
        lines.append(f"{entry}{offset},{offset + size}]}}")
        offset += size
    text = f"{{{','.join(lines)}}}".encode("ascii")
    text += b" " * (-len(text) % 8)
    return _LENGTH.pack(len(text)) + text


def parse_header(header: bytes | memoryview, raw_bytes: int) -> dict[str, HeaderTensor]:
    """Mirror of `build_header`: every tensor of a stream of `raw_bytes`, whose first bytes are `header` and nothing else.

    `CorruptCheckpointError` unless sizes fit and the tensors fill the data without holes or overlaps.
    """
    if len(header) > limits.HEADER_BYTES:
        raise ResourceLimitError(f"a safetensors header of {len(header)} bytes is above {limits.HEADER_BYTES}")
    if len(header) < 8 or _LENGTH.unpack_from(header)[0] != len(header) - 8 or len(header) > raw_bytes:
        raise CorruptCheckpointError("a safetensors header whose length is wrong")
    rows = strict_json.parse(
        bytes(header[8:]), "safetensors header", max_values=limits.HEADER_VALUES, error=CorruptCheckpointError
    )
    if type(rows) is not dict:
        raise CorruptCheckpointError("a safetensors header that is no object")
    rows.pop("__metadata__", None)
    if len(rows) > limits.TENSORS:
        raise ResourceLimitError(f"a safetensors header with {len(rows)} tensors is above {limits.TENSORS}")
    found = {name: _tensor(name, row, len(header)) for name, row in rows.items()}
    end = len(header)
    for name, tensor in sorted(found.items(), key=lambda item: (item[1].raw_offset, item[1].raw_bytes)):
        if tensor.raw_offset != end:
            raise CorruptCheckpointError("a hole or an overlap in a safetensors file", key=name[:200])
        end += tensor.raw_bytes
    if end != raw_bytes:
        raise CorruptCheckpointError(f"a safetensors file of {raw_bytes} bytes whose header describes {end}")
    return found


def _tensor(name: str, row: Any, data_start: int) -> HeaderTensor:
    if type(row) is not dict or set(row) != {"dtype", "shape", "data_offsets"}:
        raise CorruptCheckpointError("not a safetensors tensor", key=name[:200])
    shape, offsets = row["shape"], row["data_offsets"]
    if not (_sizes(shape) and len(shape) <= limits.RANK and _sizes(offsets) and len(offsets) == 2):
        raise CorruptCheckpointError("a shape or offsets that cannot be", key=name[:200])
    bits = _BITS.get(row["dtype"]) if type(row["dtype"]) is str else None
    if bits is None:
        raise CorruptCheckpointError(f"unknown safetensors type {str(row['dtype'])[:40]!r}", key=name[:200])
    begin, end = offsets
    if end - begin != math.prod(shape) * bits // 8:
        raise CorruptCheckpointError("a size that does not follow from the shape", key=name[:200])
    return HeaderTensor(row["dtype"], tuple(shape), data_start + begin, end - begin)


def _sizes(values: Any) -> bool:
    return type(values) is list and all(map(strict_json.is_size, values))
