"""Boxes: the parts in which a tensor is stored, and the parts of it that are asked for. Numbers only; no byte is read here."""

import math
import random
import secrets
from collections import defaultdict
from collections.abc import Iterator, Sequence

__all__ = ["Box", "covers", "intersect", "parts", "run_start"]

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes, one of each for every dimension."""

_PRIME = 2**61 - 1
_SOURCE = random.Random(secrets.randbits(256))  # noqa: S311 - its numbers never leave this process


def covers(offsets: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, ...]], shape: tuple[int, ...]) -> bool:
    """Whether boxes, none of them empty, hold every element of a tensor exactly once. Linear in their number, whatever they look like.

    Count at each place the boxes that hold it. The cover is exact if this count is 1 in the tensor and 0 around it. A count is known by its
    differences along all dimensions, and those of one box are 1 at its begin and -1 at its end. So give each place of each dimension a
    variable: the sum over the boxes of the product over the dimensions of (variable of the begin - variable of the end) is a polynomial,
    and it is that of the whole tensor if and only if the cover is exact. The two are compared at a random point, modulo a prime: where
    they differ they agree there with a chance of at most 64 in 2^61, and nobody who writes an index knows the point.
    """
    terms, whole = [1] * len(offsets), 1
    for begins, lengths, extent in zip(zip(*offsets, strict=True), zip(*sizes, strict=True), shape, strict=True):
        if not any(begins):  # one begin for all: a shorter one would leave a hole behind it, or overlap
            if lengths.count(extent) != len(lengths):
                return False
            continue
        point: dict[int, int] = defaultdict(_draw)
        rows = zip(terms, begins, lengths, strict=True)
        terms = [term * (point[begin] - point[begin + length]) % _PRIME for term, begin, length in rows]
        whole = whole * (point[0] - point[extent]) % _PRIME
    return sum(terms) % _PRIME == whole


def _draw() -> int:
    return _SOURCE.getrandbits(61)


def run_start(box: Box, shape: tuple[int, ...]) -> int | None:
    """Where the box begins among the elements of the shape in row-major order, if it is one run of them; else None."""
    start, begun = 0, False
    for offset, size, extent in zip(*box, shape, strict=True):
        if begun and size != extent:
            return None
        start = start * extent + offset
        begun = begun or size != 1
    return start


def intersect(one: Box, other: Box) -> Box | None:
    """What both hold; None if that is nothing."""
    offsets, sizes = [], []
    for begin, size, other_begin, other_size in zip(*one, *other, strict=True):
        start = max(begin, other_begin)
        stop = min(begin + size, other_begin + other_size)
        if start >= stop:
            return None
        offsets.append(start)
        sizes.append(stop - start)
    return tuple(offsets), tuple(sizes)


def parts(sizes: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Elements `[start, stop)` of a box of `sizes`, in row-major order, as boxes that follow each other: two a dimension at most, and one."""
    if not sizes:
        yield (), ()
        return
    rest = sizes[1:]
    row = math.prod(rest)
    first, last = start // row, (stop - 1) // row
    begin, end = start - first * row, stop - last * row
    if first == last and end - begin < row:
        yield from _below(first, rest, begin, end)
        return
    if begin:
        yield from _below(first, rest, begin, row)
        first += 1
    whole = last - first + (end == row)
    if whole:
        yield (first, *(0,) * len(rest)), (whole, *rest)
    if end < row:
        yield from _below(last, rest, 0, end)


def _below(at: int, rest: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in parts(rest, start, stop):
        yield (at, *offsets), (1, *sizes)
