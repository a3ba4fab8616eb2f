"""From a URL to a store that retries: the one place where stores are wired."""

import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from urllib.parse import quote, unquote, urlsplit

from asyncckpt.events import StoreRetried
from asyncckpt.options import S3Options
from asyncckpt.store.base import Progress, Store
from asyncckpt.store.local import LocalStore
from asyncckpt.store.memory import MemoryStore
from asyncckpt.store.posix import absolute
from asyncckpt.store.retry import RetryingStore

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*):")
_MISTYPED = re.compile(r"(s3|file|memory)//", re.IGNORECASE)
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,253}[A-Za-z0-9]")
_FORMS = "s3://bucket/prefix, file:///path, a plain path, or memory://name"

_memories: dict[str, MemoryStore] = {}
_memories_lock = threading.Lock()


@dataclass(frozen=True, slots=True)
class Location:
    """Where a URL points. `place`: a bucket, an absolute path, or a name; `prefix`: below a bucket, without `/` around."""

    scheme: Literal["s3", "file", "memory"]
    place: str
    prefix: str = ""

    def __str__(self) -> str:
        if self.scheme == "file":
            return f"file://{quote(self.place)}"
        return f"{self.scheme}://{self.place}" + (f"/{self.prefix}" if self.prefix else "")


def open_store(
    url: str | os.PathLike[str],
    options: S3Options | None = None,
    *,
    progress: Progress | None = None,
    on_retry: Callable[[StoreRetried], None] | None = None,
) -> Store:
    """A store that retries as its options say. Sends nothing yet: a wrong bucket shows at the first request."""
    location = parse_url(url)
    chosen = options or S3Options()
    if location.scheme != "s3" and chosen != S3Options():
        raise ValueError(f"S3Options are for s3:// URLs, and {str(url)!r} is none")
    return RetryingStore(_open(location, chosen, progress), chosen.retry, progress=progress, on_retry=on_retry)


def _open(location: Location, options: S3Options, progress: Progress | None) -> Store:
    if location.scheme == "memory":
        with _memories_lock:
            return _memories.setdefault(location.place, MemoryStore())
    if location.scheme == "file":
        return LocalStore(location.place, progress=progress)
    from asyncckpt.store.s3 import S3Store  # noqa: PLC0415 - boto3 takes a third of a second, which no local run pays

    return S3Store(location.place, location.prefix, options, progress=progress)


def parse_url(url: str | os.PathLike[str]) -> Location:
    """Where a URL or a path points; `ValueError` says which forms there are. Relative paths are made absolute."""
    text = os.fspath(url)
    if not text or "\0" in text:
        raise ValueError(f"no place for checkpoints: {text!r}; give {_FORMS}")
    scheme = _SCHEME.match(text) if isinstance(url, str) else None
    if scheme is None and _MISTYPED.match(text):
        raise ValueError(f"a colon is missing in {text!r}; give {_FORMS}, or ./{text} if it is a folder")
    if scheme is None:
        return Location("file", _absolute(text))
    rest = text[scheme.end() :]
    if not rest.startswith("//"):
        raise ValueError(f"cannot read {text!r}: a URL has // behind its scheme, a path with a colon starts with ./")
    match scheme[1].lower():
        case "s3":
            return _parse_s3(text, rest[2:])
        case "file":
            return _parse_file(text)
        case "memory":
            if not rest[2:]:
                raise ValueError("memory:// needs a name: memory://name")
            return Location("memory", rest[2:])
    raise ValueError(f"no store for {scheme[1]}://; give {_FORMS}")


def _absolute(text: str) -> str:
    try:
        return str(absolute(Path(text).expanduser()))
    except RuntimeError as error:  # ~somebody
        raise ValueError(f"cannot read {text!r}: {error}; give {_FORMS}") from error


def _parse_s3(text: str, rest: str) -> Location:
    bucket, _, prefix = rest.partition("/")
    prefix = prefix.strip("/")
    if "@" in bucket:
        raise ValueError("credentials do not belong in a URL; botocore finds them in the environment or a profile")
    if not _BUCKET.fullmatch(bucket):
        raise ValueError(f"not a bucket's name: {bucket!r} in {text!r}; give s3://bucket/prefix")
    if prefix and not all(part not in ("", ".", "..") and part.isprintable() for part in prefix.split("/")):
        raise ValueError(f"not a prefix: {prefix!r} in {text!r}; its parts must not be empty, . or ..")
    return Location("s3", bucket, prefix)


def _parse_file(text: str) -> Location:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost") or not parts.path.startswith("/"):
        raise ValueError(f"not a path of this host: {text!r}; give file:///absolute/path")
    if parts.query or parts.fragment:
        raise ValueError(f"a file:// URL has no ? and no #: {text!r}; escape them as %3F and %23, or give a plain path")
    return Location("file", str(Path(unquote(parts.path))))
