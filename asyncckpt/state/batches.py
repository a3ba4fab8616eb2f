"""Batches of a loader, which know whether their epoch is over.

`iter()` of a torch DataLoader draws from torch's generator. A run that is resumed within an epoch must forget that draw, since the uninterrupted
run drew before the state was saved; one that is resumed between two epochs must not, since both draw behind it.
"""

import weakref
from collections.abc import Iterable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Batches(Iterator[T], Generic[T]):
    """`iter(loader)`. `under_way`: more batches may come; False once the last one was given, as far as `len(loader)` tells."""

    def __init__(self, loader: Iterable[T]) -> None:
        self.under_way = True
        self.iterator = iter(loader)
        self._left = _length(loader)
        _all.add(self)

    def __next__(self) -> T:
        try:
            batch = next(self.iterator)
        except StopIteration:
            self.under_way = False
            raise
        if self._left is not None:
            self._left -= 1
            self.under_way = self._left > 0
        return batch


_all: "weakref.WeakSet[Batches[Any]]" = weakref.WeakSet()
_seen = False


def begin(loader: Iterable[T]) -> Batches[T]:
    """Batches that this process is known by from now on."""
    global _seen  # noqa: PLW0603 - the generators, too, are the process's
    _seen = True
    return Batches(loader)


def between_epochs() -> bool:
    """Whether the next thing that this process draws is the order of an epoch: no batches are under way, and some have been."""
    return _seen and not any(batches.under_way for batches in list(_all))


def has_place(loader: object) -> bool:
    """Whether a loader restores its own place in the epoch, and with it what its `iter()` drew."""
    return callable(getattr(loader, "load_state_dict", None))


def _length(loader: Iterable[T]) -> int | None:
    try:
        return len(loader)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # a stream
        return None
