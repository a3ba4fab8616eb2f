"""The state file: every value that is no tensor, by its full path."""

import io
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError, UnsafeCheckpointError
from asyncckpt.format import limits
from asyncckpt.state.unpickling import unpickle
from asyncckpt.state.walk import CONSTANTS, SCALARS

_ENTRIES = 64
_DIRECTORY_BYTES = 2**17
"""Most that is read at once to learn what an archive holds: a longer list would be made of objects before it could be counted."""


def write_state(values: Mapping[str, Any]) -> bytes:
    """`torch.save` of the flat dict, as bytes; `torch.load(weights_only=True)` opens it without us."""
    buffer = io.BytesIO()
    torch.save(dict(values), buffer, pickle_protocol=2)
    return buffer.getvalue()


def read_state(data: bytes, *, max_bytes: int = limits.STATE_BYTES) -> dict[str, Any]:
    """Mirror of `write_state`, for bytes that anybody may have written. Runs no code of theirs, whatever they hold.

    Raises:
        ResourceLimitError: Larger than `max_bytes`.
        UnsafeCheckpointError: Compressed entries, or a pickle of anything but plain values, or out of all proportion.
        CorruptCheckpointError: Not a state file.
        FormatVersionError: An element type that this torch lacks.
    """
    if len(data) > max_bytes:
        raise ResourceLimitError(f"the state file holds {len(data)} bytes, more than the limit of {max_bytes}")
    values = unpickle(_stored_pickle(data))
    if type(values) is not dict or not all(type(path) is str for path in values):
        raise CorruptCheckpointError("the state file holds no dict of paths")
    for path, value in values.items():
        if not _is_plain(value):
            raise CorruptCheckpointError(f"the state file holds a {type(value).__name__} at {path!r}", key=path)
    return values


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in (list, tuple, set):
        return SCALARS.issuperset(map(type, value))
    return kind in SCALARS or kind in CONSTANTS


def _stored_pickle(data: bytes) -> bytes:
    """The pickle inside, after looking that nothing is compressed."""
    file = _File(data)
    try:
        with zipfile.ZipFile(file) as archive:
            file.most_bytes = len(data)
            entries = archive.infolist()
            if len(entries) > _ENTRIES:
                raise UnsafeCheckpointError(f"the state file has {len(entries)} entries; a state file has few")
            for entry in entries:
                if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size:
                    raise UnsafeCheckpointError(f"entry {entry.filename[:100]!r} of the state file is compressed")
            if sum(entry.file_size for entry in entries) > len(data):
                raise UnsafeCheckpointError("the state file's entries overlap")
            inside = [entry for entry in entries if entry.filename.endswith("/data.pkl")]
            if len(inside) != 1:
                raise CorruptCheckpointError("the state file holds no pickle, or several")
            return archive.read(inside[0])
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise CorruptCheckpointError(f"the state file is no archive of torch.save: {error}") from error


class _File(io.BytesIO):
    """An archive of which little is read at once until its entries are counted."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self.most_bytes = _DIRECTORY_BYTES
        self._size_bytes = len(data)

    def read(self, size: int | None = -1) -> bytes:
        left = max(0, self._size_bytes - self.tell())
        wanted = left if size is None or size < 0 else min(size, left)
        if wanted > self.most_bytes:
            raise UnsafeCheckpointError(f"the state file lists its entries in more than {self.most_bytes} bytes")
        return super().read(wanted)
