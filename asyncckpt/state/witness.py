"""Witnesses of an overlapped snapshot: what its sources looked like at `save()`, to be held against them afterwards.

Three of them a tensor, because none sees every writer. `_version` rises with ordinary in-place operations, but not with
fused optimizers, `.data` writes or NumPy. The storage's address tells a swapped `.data`. One random word of a CPU
tensor tells whoever rewrote it: at the end it must still stand in the source, and in the arena. What no witness sees:
a write that spares the word and the version, such as a NumPy write of a few elements, or the replay of a CUDA graph.

All words are read by a few NumPy gathers over the address space.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from asyncckpt.state.sight import Integers, Sight, addresses_of, versions_of

_SIZES = (8, 4, 2, 1)  # of a word, in bytes
_FORMATS: dict[int, Any] = {8: "Q", 4: "I", 2: "H", 1: "B"}


class _Memory:
    """The address space as words of one size, for NumPy. Word n stands at `(n + 1) * size_bytes`: 0 is no address."""

    def __init__(self, size_bytes: int) -> None:
        self.__array_interface__ = {
            "version": 3,
            "data": (size_bytes, True),
            "shape": (2**56 // size_bytes,),
            "typestr": np.dtype(f"u{size_bytes}").str,
        }


_MEMORY: dict[int, Any] = {size_bytes: np.asarray(_Memory(size_bytes)) for size_bytes in _SIZES}


def _words_of(buffer: Any, size_bytes: int) -> Any:
    return memoryview(buffer).cast("B").cast(_FORMATS[size_bytes])


@dataclass(frozen=True, slots=True)
class _Group:
    """Tensors whose word has the same size. `counts`: words of each; `begins`: its first one in the arena."""

    size_bytes: int
    members: Integers
    counts: npt.NDArray[np.float64]
    begins: Integers


@dataclass(frozen=True, slots=True)
class Layout:
    """Sizes of some tensors and where each stands in the arena; one entry a tensor, none is empty."""

    shapes: tuple[tuple[int, ...], ...]
    offsets: Integers
    sizes_bytes: Integers
    element_bytes: Integers
    groups: tuple[_Group, ...]  # if all are contiguous and aligned to their words
    masks: Integers  # bits of an address that are 0 then

    @classmethod
    def of(cls, shapes: Sequence[tuple[int, ...]], offsets: Sequence[int], element_bytes: Sequence[int]) -> "Layout":
        """`offsets` are the arena's."""
        elements, places = np.array(element_bytes, np.int64), np.array(offsets, np.int64)
        sizes = np.fromiter(map(math.prod, shapes), np.int64, len(shapes)) * elements
        words = _word_sizes(sizes, np.zeros_like(sizes))
        return cls(tuple(shapes), places, sizes, elements, _grouped(words, sizes, places), words - 1)

    def groups_of(self, addresses: Integers, strides: dict[int, tuple[int, ...]]) -> tuple[_Group, ...]:
        """Sized for these addresses; of tensors that are not contiguous only single elements stand together."""
        if not strides and not (addresses & self.masks).any():
            return self.groups
        together = self.sizes_bytes.copy()
        odd = list(strides)
        together[odd] = self.element_bytes[odd]
        return _grouped(_word_sizes(together, addresses), self.sizes_bytes, self.offsets)

    def __len__(self) -> int:
        return len(self.shapes)


@dataclass(frozen=True, slots=True)
class Places:
    """Where one word of each member stands, all of one size: in memory and in the arena."""

    size_bytes: int
    members: Integers
    in_memory: Integers
    in_arena: Integers

    def read(self) -> "Words":
        """What stands there now."""
        return Words(self, _MEMORY[self.size_bytes].take(self.in_memory))


@dataclass(frozen=True, slots=True)
class Words:
    """Words, and what stood there."""

    places: Places
    values: npt.NDArray[Any]

    def written(self, arena: mmap.mmap) -> int | None:
        """The first member whose word no longer stands in its source, or does not stand in the arena.

        Sources must be alive. Keeps the GIL: NumPy would give it away in every call, and beside a busy main thread the
        copy thread would wait 5 ms for it each time.
        """
        then = tuple(self.values.tolist())
        at = self.places
        for buffer, numbers in ((_MEMORY[at.size_bytes], at.in_memory), (arena, at.in_arena)):
            words = _words_of(buffer, at.size_bytes)
            first, *rest = numbers.tolist()
            now = itemgetter(first, first, *rest)(words)[1:]  # twice: of a single item it makes no tuple
            if now != then:
                return int(at.members[_first_difference(now, then)])
        return None


def draw(
    layout: Layout, addresses: Integers, strides: dict[int, tuple[int, ...]], random: np.random.Generator
) -> list[Places]:
    """Choose a random word of each tensor. `strides` names the tensors that are not contiguous."""
    drawn = []
    for group in layout.groups_of(addresses, strides):
        size, members = group.size_bytes, group.members
        places = (random.random(len(members)) * group.counts).astype(np.int64)
        in_memory = addresses[members] // size + (places - 1)
        if strides:
            _scatter(layout, group, addresses, strides, (in_memory, places))
        drawn.append(Places(size, members, in_memory, group.begins + places))
    return drawn


def _scatter(
    layout: Layout,
    group: _Group,
    addresses: Integers,
    strides: dict[int, tuple[int, ...]],
    drawn: tuple[Integers, Integers],
) -> None:
    """Correct the places, in memory and arena, of strided members: the first word of the element that was drawn."""
    in_memory, places = drawn
    among = np.array([at for at, member in enumerate(group.members.tolist()) if member in strides], np.int64)
    if len(among):
        odd = group.members[among]
        element_words = layout.element_bytes[odd] // group.size_bytes
        elements = places[among] // element_words
        steps = _steps(elements, [layout.shapes[i] for i in odd], [strides[i] for i in odd.tolist()])
        in_memory[among] = addresses[odd] // group.size_bytes + steps * element_words - 1
        places[among] = elements * element_words


class Ahead:
    """Draws the places of a save's words behind the save before, as most tensors stay where they are: 0.1 ms less of each call."""

    def __init__(self, random: np.random.Generator) -> None:
        self._random = random
        self._drawn: tuple[Layout, bytes, list[Places]] | None = None

    def draw(self, layout: Layout, addresses: Integers) -> None:
        """Before the next save. For contiguous tensors."""
        self._drawn = (layout, addresses.tobytes(), draw(layout, addresses, {}, self._random))

    def take(self, layout: Layout, addresses: Integers, strides: dict[int, tuple[int, ...]]) -> list[Places]:
        """Places that were not used before."""
        drawn, self._drawn = self._drawn, None
        if drawn is not None and not strides and drawn[0] is layout and drawn[1] == addresses.tobytes():
            return drawn[2]
        return draw(layout, addresses, strides, self._random)


class Witnesses:
    """Taken at `save()`, held against the tensors when the copy is complete. The caller keeps the storages alive."""

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        sight: Sight,
        layout: Layout | None,
        ahead: Ahead,
    ) -> None:
        """`sight`: of these tensors, now. `layout` None: no words, for tensors that are not in host memory."""
        self._tensors = tensors
        self._addresses = sight.addresses
        self._versions = sight.versions
        self._words: list[Words] = []
        if layout is not None:
            strides: dict[int, tuple[int, ...]] = {}
            if not sight.contiguous:
                strides = {i: tensor.stride() for i, tensor in enumerate(tensors) if not tensor.is_contiguous()}
            self._words = [places.read() for places in ahead.take(layout, sight.addresses, strides)]

    def difference(self, arena: mmap.mmap | None) -> tuple[int, str] | None:
        """Position of a tensor that somebody wrote, and how it shows; None if nobody did.

        Without an arena the words are left out: the copy is not complete.
        """
        now = versions_of(self._tensors)
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


def freed(tensors: Sequence[torch.Tensor], addresses: Integers) -> int | None:
    """Position of a tensor that has elements but no memory: reading it would kill the process."""
    if np.count_nonzero(addresses) == len(addresses):
        return None
    return next((i for i in np.flatnonzero(addresses == 0).tolist() if tensors[i].numel()), None)


def _first_difference(now: Sequence[Any], then: Sequence[Any]) -> int:
    return next(i for i, pair in enumerate(zip(now, then, strict=True)) if pair[0] != pair[1])


def _word_sizes(together_bytes: Integers, addresses: Integers) -> Integers:
    """For each tensor the largest word that fits into what stands together and is aligned."""
    sizes = np.full(len(addresses), _SIZES[0], np.int64)
    for size in _SIZES[1:]:
        sizes[(sizes > together_bytes) | ((addresses & (sizes - 1)) != 0)] = size
    return sizes


def _grouped(words: Integers, sizes_bytes: Integers, offsets: Integers) -> tuple[_Group, ...]:
    found = ((size, np.flatnonzero(words == size)) for size in _SIZES)
    return tuple(
        _Group(size, members, (sizes_bytes[members] // size).astype(np.float64), offsets[members] // size)
        for size, members in found
        if len(members)
    )


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
