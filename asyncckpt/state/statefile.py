"""The state file: every value that is no tensor, by its full path. The only reader of a pickle in the package stands here."""

import io
import pickle
import pickletools
import zipfile
from collections.abc import Mapping
from typing import Any

import torch

from asyncckpt.errors import CorruptCheckpointError, ResourceLimitError, UnsafeCheckpointError
from asyncckpt.format import limits
from asyncckpt.state.walk import CONSTANTS, SCALARS

OLDEST_SAFE_TORCH = (2, 10)
"""CVE-2025-32434 and CVE-2026-24747 let `weights_only=True` run code before this version."""

_ENTRIES = 64
_GLOBALS = frozenset(
    {"torch Size", "torch device", "_codecs encode", "__builtin__ set", "__builtin__ complex"}
    | {str(dtype).replace(".", " ") for dtype in vars(torch).values() if isinstance(dtype, torch.dtype)}
)
"""What a pickle of our values may name, as pickletools shows it; narrower than what `weights_only` allows."""
_TENSOR_OPCODES = frozenset({"BINPERSID", "PERSID"})


def write_state(values: Mapping[str, Any]) -> bytes:
    """`torch.save` of the flat dict, as bytes; `torch.load(weights_only=True)` opens it without us."""
    buffer = io.BytesIO()
    torch.save(dict(values), buffer)
    return buffer.getvalue()


def read_state(data: bytes, *, max_bytes: int = limits.STATE_BYTES) -> dict[str, Any]:
    """Mirror of `write_state`, for bytes that anybody may have written. Runs no code of theirs, whatever they hold.

    Raises:
        ResourceLimitError: Larger than `max_bytes`.
        UnsafeCheckpointError: Compressed entries (a bomb), a pickle that names anything but plain values, or a torch too old.
        CorruptCheckpointError: Not a state file.
    """
    _require_safe_torch()
    if len(data) > max_bytes:
        raise ResourceLimitError(f"the state file holds {len(data)} bytes, more than the limit of {max_bytes}")
    archive = _plain_archive(_stored_pickle(data))
    try:
        values = torch.load(io.BytesIO(archive), weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError("the state file's pickle was refused by torch.load(weights_only=True)") from error
    except Exception as error:
        raise CorruptCheckpointError(f"the state file cannot be read: {type(error).__name__}: {error}") from error
    if type(values) is not dict or not all(type(path) is str for path in values):
        raise CorruptCheckpointError("the state file holds no dict of paths")
    for path, value in values.items():
        if not _is_plain(value):
            raise CorruptCheckpointError(f"the state file holds a {type(value).__name__} at {path!r}", key=path)
    return values


def _require_safe_torch() -> None:
    release = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if release < OLDEST_SAFE_TORCH:
        raise UnsafeCheckpointError(f"torch {torch.__version__} cannot load values safely; use torch 2.10 or later")


def _is_plain(value: Any) -> bool:
    kind = type(value)
    if kind in (list, tuple, set):
        return SCALARS.issuperset(map(type, value))
    return kind in SCALARS or kind in CONSTANTS


def _stored_pickle(data: bytes) -> bytes:
    """The pickle inside, after looking that nothing is compressed and that it names nothing but plain values."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
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
            pickled = archive.read(inside[0])
    except (zipfile.BadZipFile, EOFError, ValueError, NotImplementedError, RuntimeError, OSError) as error:
        raise CorruptCheckpointError(f"the state file is no archive of torch.save: {error}") from error
    _check_pickle(pickled)
    return pickled


def _check_pickle(pickled: bytes) -> None:
    try:
        for opcode, argument, _ in pickletools.genops(pickled):
            if opcode.name == "GLOBAL" and argument not in _GLOBALS:
                raise UnsafeCheckpointError(
                    f"the state file's pickle names {str(argument)[:200]!r}, which is no plain value"
                )
            if opcode.name in _TENSOR_OPCODES:
                raise UnsafeCheckpointError("the state file's pickle refers to storages; tensors never stand in it")
    except (ValueError, UnicodeDecodeError, EOFError, IndexError) as error:
        raise CorruptCheckpointError(f"the state file's pickle is malformed: {error}") from error


def _plain_archive(pickled: bytes) -> bytes:
    """A fresh archive of that pickle alone: what was checked is what torch reads, however two zip readers differ."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("state/data.pkl", pickled)
        archive.writestr("state/byteorder", "little")
        archive.writestr("state/version", "3\n")
    return buffer.getvalue()
