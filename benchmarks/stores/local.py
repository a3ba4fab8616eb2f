"""Folders: in memory, or on the real disk."""

import itertools
import re
import shutil
import tempfile
from pathlib import Path
from typing import Self

from benchmarks.stores.base import Place, Store

DISK = Path("~/.cache/asyncckpt-benchmarks/disk")


class FolderStore(Store):
    """Places are folders below `base`."""

    def __init__(self, name: str, base: Path) -> None:
        self.name = name
        self._base = base
        self._numbers = itertools.count()

    def __enter__(self) -> Self:
        self._base.mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix=f"{self.name}-", dir=self._base))
        return self

    def __exit__(self, *_: object) -> None:
        shutil.rmtree(self._folder, ignore_errors=True)

    def place(self, system: str) -> Place:
        folder = self._folder / f"{next(self._numbers)}-{plain(system)}"
        folder.mkdir()
        return Place(system, folder=folder)


def plain(system: str) -> str:
    """A system's name as one piece of a path or key, which every system's own rules for keys accept."""
    return re.sub(r"[^a-z0-9]+", "-", system.lower())
