"""Names: of a leaf in the state (paths), of objects in a store (keys)."""

import re
from collections.abc import Iterable, Sequence

from asyncckpt.errors import ResourceLimitError, UnsafeCheckpointError, UnsupportedObjectError
from asyncckpt.format import limits

Key = str | int

_RESERVED = "__metadata__"  # safetensors writes a tensor of this name and never reads it back
_ESCAPED_RESERVED = "%5F_metadata__"
_ESCAPES = {"%": "%25", "/": "%2F", "@": "%40"}
_SPECIAL = re.compile("[%/@]")
_UNESCAPES = {"25": "%", "2F": "/", "40": "@", "23": "#", "5F": "_"}
_ESCAPED = re.compile("%(25|2F|40|23|5F)")
_INTEGER = re.compile(r"#(0|-?[1-9][0-9]*)")
_INTEGER_DIGITS = 19

_NAME = r"[a-z0-9][a-z0-9._-]{0,127}"
_STEP = r"step-([0-9]{10}|[1-9][0-9]{10,15})"
_RECORD = re.compile(rf"{_STEP}\.json")
_DAMAGED = re.compile(rf"{_STEP}\.damaged")
_FOLDER = re.compile(rf"{_STEP}/(?:{_NAME}/)?(?:{_NAME})?")
_ATTEMPT_FOLDER = re.compile(rf"{_STEP}/{_NAME}/")
_WRITER_FOLDER = re.compile(rf"{_STEP}/[0-9a-f]{{8}}-[0-9]{{1,20}}/")
_OBJECT = re.compile(rf"{_STEP}/{_NAME}/{_NAME}")
_SLUG_CHARACTERS = 64


def escape(key: Key) -> str:
    """One key as a part of a path. Injective: `unescape` gives the key back, type and all."""
    if type(key) is int:
        if not -limits.KEY_INT <= key < limits.KEY_INT:
            raise UnsupportedObjectError(
                f"an integer key of {key.bit_length()} bits cannot be stored, only -2^63 to 2^63-1; use a string"
            )
        return f"#{key}"
    if type(key) is not str:
        raise UnsupportedObjectError(
            f"a key of type {type(key).__name__} cannot be stored; use str or int", key=repr(key)
        )
    try:
        key.encode()
    except UnicodeEncodeError as error:
        raise UnsupportedObjectError(
            "a key with a lone surrogate is no text and cannot be stored", key=repr(key)
        ) from error
    if key == _RESERVED:
        return _ESCAPED_RESERVED
    if _SPECIAL.search(key):
        key = _SPECIAL.sub(lambda match: _ESCAPES[match[0]], key)
    return "%23" + key[1:] if key[:1] == "#" else key


def unescape(part: str) -> Key:
    """Mirror of `escape`; `ValueError` for a part that no key escapes to, `ResourceLimitError` for an integer beyond the limit."""
    if part[:1] == "#":
        if not _INTEGER.fullmatch(part):
            raise ValueError(f"not a key: {part[:100]!r}")
        number = int(part[1:]) if len(part) <= _INTEGER_DIGITS + 2 else limits.KEY_INT
        if not -limits.KEY_INT <= number < limits.KEY_INT:
            raise ResourceLimitError(f"an integer key beyond 2^63: {part[:100]!r}")
        return number
    key = _ESCAPED.sub(lambda match: _UNESCAPES[match[1]], part) if "%" in part else part
    try:
        escaped = escape(key)
    except UnsupportedObjectError as error:  # a lone surrogate
        raise ValueError(f"not a key: {part[:100]!r}") from error
    if escaped != part:
        raise ValueError(f"not a key: {part[:100]!r}")
    return key


def join(keys: Iterable[Key]) -> str:
    """The path of a leaf: its keys from the top of the state."""
    return "/".join(map(escape, keys))


def split(path: str) -> tuple[Key, ...]:
    """Mirror of `join`."""
    return tuple(map(unescape, path.split("/")))


def slugs(groups: Sequence[Key | None]) -> list[str]:
    """For each group the first part of its shards' names: `[a-z0-9._-]`, at most 64 characters, no two alike."""
    taken: set[str] = set()
    found = []
    for group in groups:
        text = "state" if group is None else str(group)
        text = re.sub(r"[^a-z0-9._-]+", "-", text[:1024].lower()).strip("._-")[:_SLUG_CHARACTERS] or "group"
        slug, count = text, 1
        while slug in taken:
            count += 1
            slug = f"{text[: _SLUG_CHARACTERS - 8]}-{count}"
        taken.add(slug)
        found.append(slug)
    return found


def record_key(step: int) -> str:
    """The record: it exists if and only if the checkpoint exists. Keys sort by step up to ten digits."""
    return f"step-{_checked(step):010d}.json"


def damaged_key(step: int) -> str:
    """The mark that sets a damaged checkpoint aside."""
    return f"step-{_checked(step):010d}.damaged"


def folder(step: int, attempt: str) -> str:
    """Where one attempt at a step puts its objects; no other attempt ever writes there."""
    return f"step-{_checked(step):010d}/{attempt}/"


def parse_record_key(key: str) -> int | None:
    """The step of a record's key, or None."""
    return _step(_RECORD, key)


def parse_damaged_key(key: str) -> int | None:
    """The step of a damage mark's key, or None."""
    return _step(_DAMAGED, key)


def parse_folder(key: str) -> int | None:
    """The step of a folder (`step-0000001000/`, also with its attempt) or of an object in one, or None."""
    return _step(_FOLDER, key)


def attempt_folder(key: str) -> str | None:
    """The folder of a writer's attempt that a key is below, at any depth; None if nothing of that name is a writer's."""
    match = _WRITER_FOLDER.match(key)
    return match[0] if match and parse_folder(match[0]) is not None else None


def is_object_key(key: str) -> bool:
    """Whether a checkpoint's object may have this name: `step-<digits>/<attempt>/<name>`."""
    return _OBJECT.fullmatch(key) is not None


def check_object_key(key: str) -> str:
    """Return `key`; `UnsafeCheckpointError` unless it is `step-<digits>/<attempt>/<name>`, whatever an index says.

    So nothing read from a store can lead out of the root, to another bucket, or to a record.
    """
    if type(key) is not str or not is_object_key(key):
        raise UnsafeCheckpointError(f"not the key of a checkpoint's object: {str(key)[:200]!r}")
    return key


def check_folder(key: str) -> str:
    """Return `key`; `UnsafeCheckpointError` unless it is `step-<digits>/<attempt>/`."""
    if type(key) is not str or not _ATTEMPT_FOLDER.fullmatch(key):
        raise UnsafeCheckpointError(f"not the folder of an attempt: {str(key)[:200]!r}")
    return key


def _checked(step: int) -> int:
    if not 0 <= step <= limits.STEP:
        raise ValueError(f"a step is a number from 0 to 2^53, not {step}")
    return step


def _step(pattern: re.Pattern[str], key: str) -> int | None:
    match = pattern.fullmatch(key)
    step = int(match[1]) if match else limits.STEP + 1
    return step if step <= limits.STEP else None
