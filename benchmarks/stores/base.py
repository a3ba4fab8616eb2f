"""The one contract of every store that a benchmark saves to."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Self


@dataclass(frozen=True, slots=True)
class Place:
    """Where one system saves, empty and its own: a local folder, or `s3://bucket/prefix` behind an endpoint.

    Credentials for the endpoint are in the environment while its store is open. `conditional_puts`: it honours `If-None-Match`.
    """

    name: str
    folder: Path | None = None
    url: str | None = None
    endpoint_url: str | None = None
    region: str = "us-east-1"
    conditional_puts: bool = True

    def __post_init__(self) -> None:
        if (self.folder is None) == (self.url is None):
            raise ValueError("a place is either a folder or a url")

    @property
    def kind(self) -> str:
        """`"folder"` or `"s3"`, as in `Peer.stores`."""
        return "folder" if self.url is None else "s3"

    @property
    def bucket(self) -> str:
        """Of an `s3` place."""
        return self._parts()[0]

    @property
    def prefix(self) -> str:
        """Of an `s3` place, without slashes around it."""
        return self._parts()[1]

    def _parts(self) -> tuple[str, str]:
        assert self.url is not None
        bucket, _, prefix = self.url.removeprefix("s3://").partition("/")
        return bucket, prefix.strip("/")


class Store(ABC):
    """A context manager: open inside it, and gone with everything it held afterwards."""

    name: str

    @abstractmethod
    def __enter__(self) -> Self: ...

    @abstractmethod
    def __exit__(self, *_: object) -> None: ...

    @abstractmethod
    def place(self, system: str) -> Place:
        """A new, empty place for one system; asked for again, another one."""

    def requests(self) -> int:
        """Requests that the store's server has answered; 0 for a folder, and for a server that does not count."""
        return 0

    def server_cpu_s(self) -> float:
        """CPU seconds that the store's server has used: they are not the saver's; 0 for a folder."""
        return 0.0

    def pids(self) -> list[int]:
        """Processes of the store that are children of this one: neither their memory nor their time is the saver's."""
        return []
