"""Witnesses of an overlapped snapshot: what its sources looked like at `save()`, to be held against them afterwards.

Three of them a tensor, because none sees every writer. `_version` rises with ordinary in-place operations, but not with
fused optimizers, `.data` writes or NumPy. The storage's address tells a swapped `.data`. One random word of a CPU
tensor tells whoever rewrote it: at the end it must still stand in the source, and in the arena. What no witness sees:
a write that spares the word and the version, such as a NumPy write of a few elements, or the replay of a CUDA graph.

All words are read by a few NumPy gathers over the address space: 30 microseconds for 450 tensors.
"""

import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter, itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Integers = npt.NDArray[np.int64]
_FORMATS: dict[int, Any] = {
    np.dtype(kind).itemsize: np.dtype(kind).char for kind in (np.uint64, np.uint32, np.uint16, np.uint8)
}
"""Sizes of a word, falling, and what `memoryview` calls them."""
_version_of = attrgetter("_version")


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of some tensors and where each stands in the arena; one entry a tensor that is not empty."""

    shapes: tuple[tuple[int, ...], ...]
    offsets: Integers
    sizes_bytes: Integers
    element_bytes: Integers

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], offsets: Sequence[int], element_bytes: Sequence[int]) -> "Layout":
        """`offsets` are the arena's."""
        elements = np.array(element_bytes, np.int64)
        counts = np.fromiter((np.prod(shape, dtype=np.int64) for shape in shapes), np.int64, len(shapes))
        return cls(tuple(shapes), np.array(offsets, np.int64), counts * elements, elements)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True, slots=True)
class Words:
    """Words of one size, one of each member. `in_source` and `in_arena` count in words, from `memory` and the arena's begin."""

    size_bytes: int
    members: Integers
    memory: Any
    in_source: Integers
    in_arena: Integers
    values: npt.NDArray[Any]

    def written(self, arena: mmap.mmap) -> int | None:
        """The first member whose word no longer stands in its source, or does not stand in the arena.

        Sources must be alive. Keeps the GIL: NumPy would give it away in every call, and the copy thread would wait 5 ms for
        it each time beside a busy main thread.
        """
        then = tuple(self.values.tolist())
        words = memoryview(arena).cast("B")[: len(arena) // 8 * 8].cast(_FORMATS[self.size_bytes])
        for memory, places in ((memoryview(self.memory), self.in_source), (words, self.in_arena)):
            first, *rest = places.tolist()
            now = itemgetter(first, first, *rest)(memory)[1:]  # twice: of a single item it makes no tuple
            if now != then:
                return int(self.members[_first_difference(now, then)])
        return None


def draw(
    layout: Layout, addresses: Integers, strides: dict[int, tuple[int, ...]], random: np.random.Generator
) -> list[Words]:
    """Read one word of each tensor at a random place. `strides` names the tensors that are not contiguous."""
    sizes = _word_sizes(layout, addresses, strides)
    places = (random.random(len(layout)) * (layout.sizes_bytes // sizes)).astype(np.int64) * sizes
    sources = addresses + places
    if strides:
        odd = np.fromiter(strides, np.int64, len(strides))
        elements = places[odd] // layout.element_bytes[odd]
        steps = _steps(elements, [layout.shapes[i] for i in strides], list(strides.values()))
        sources[odd] = addresses[odd] + steps * layout.element_bytes[odd]
        places[odd] = elements * layout.element_bytes[odd]
    inside = layout.offsets + places
    drawn = []
    for size in _FORMATS:
        members = np.flatnonzero(sizes == size)
        if len(members):
            these = sources[members]
            low = int(these.min())
            memory = np.asarray(_Memory(low, (int(these.max()) - low) // size + 1, size))
            in_source = (these - low) // size
            drawn.append(Words(size, members, memory, in_source, inside[members] // size, memory.take(in_source)))
    return drawn


class Witnesses:
    """Taken at `save()`, held against the tensors when the copy is complete. The caller keeps the storages alive."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        addresses: Integers,
        layout: Layout | None,
        random: np.random.Generator,
    ) -> None:
        """`addresses`: theirs. `layout` None: no words, for tensors that are not in host memory."""
        self._tensors = tensors
        self._addresses = addresses
        self._versions = _versions(tensors)
        self._words: list[Words] = []
        if layout is not None:
            strides: dict[int, tuple[int, ...]] = {}
            if not all(map(torch.Tensor.is_contiguous, tensors)):
                strides = {i: tensor.stride() for i, tensor in enumerate(tensors) if not tensor.is_contiguous()}
            self._words = draw(layout, addresses, strides, random)

    def difference(self, arena: mmap.mmap | None) -> tuple[int, str] | None:
        """Position of a tensor that somebody wrote, and how it shows; None if nobody did.

        Without an arena the words are left out: the copy is not complete.
        """
        now = _versions(self._tensors)
        if now != self._versions:
            return _first_difference(now, self._versions), "was written in place"
        addresses = addresses_of(self._tensors)
        if addresses.tobytes() != self._addresses.tobytes():
            return _first_difference(addresses.tolist(), self._addresses.tolist()), "got another storage"
        if arena is not None:
            for words in self._words:
                member = words.written(arena)
                if member is not None:
                    return member, "was overwritten without a new version (a fused step, `.data`, NumPy)"
        return None


def addresses_of(tensors: Sequence[torch.Tensor]) -> Integers:
    """Where the tensors' bytes begin; 0 for one whose storage was freed."""
    return np.fromiter(map(torch.Tensor.data_ptr, tensors), np.int64, len(tensors))


def freed(tensors: Sequence[torch.Tensor], addresses: Integers) -> int | None:
    """Position of a tensor that has elements but no memory: reading it would kill the process."""
    return next((i for i in np.flatnonzero(addresses == 0).tolist() if tensors[i].numel()), None)


def _versions(tensors: Sequence[torch.Tensor]) -> list[int | None]:
    try:
        return list(map(_version_of, tensors))
    except RuntimeError:  # inference tensors count no versions
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _first_difference(now: Sequence[Any], then: Sequence[Any]) -> int:
    return next(i for i, pair in enumerate(zip(now, then, strict=True)) if pair[0] != pair[1])


def _word_sizes(layout: Layout, addresses: Integers, strides: dict[int, tuple[int, ...]]) -> Integers:
    """The largest power of two up to 8 that each tensor has bytes for and is aligned to."""
    sizes = np.full(len(layout), max(_FORMATS), np.int64)
    if strides:  # only single elements stand together
        odd = list(strides)
        sizes[odd] = np.minimum(sizes[odd], layout.element_bytes[odd])
    for size in tuple(_FORMATS)[1:]:
        too_large = (sizes > layout.sizes_bytes) | ((addresses & (sizes - 1)) != 0)
        if not too_large.any():
            break
        sizes[too_large] = size
    return sizes


def _steps(elements: Integers, shapes: list[tuple[int, ...]], strides: list[tuple[int, ...]]) -> Integers:
    """How many elements from the first the n-th element (in row order) of each strided tensor stands."""
    rank = max(map(len, shapes))
    sizes = np.array([(1,) * (rank - len(shape)) + shape for shape in shapes], np.int64)
    steps = np.array([(0,) * (rank - len(stride)) + stride for stride in strides], np.int64)
    rest, total = elements.copy(), np.zeros_like(elements)
    for axis in range(rank - 1, -1, -1):
        total += rest % sizes[:, axis] * steps[:, axis]
        rest //= sizes[:, axis]
    return total


class _Memory:
    """A stretch of the address space as something NumPy reads without a copy."""

    def __init__(self, address: int, items: int, item_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (address, True),
            "shape": (items,),
            "typestr": np.dtype(f"u{item_bytes}").str,
        }
