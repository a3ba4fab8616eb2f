"""Boxes against counting every element."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asyncckpt.format.box import covers, intersect, parts, run_start
from tests.boxes import partition

SHAPE = st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple)


def slices(box):
    return tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))


def exact(boxes, shape) -> bool:
    """By counting, in a space with a border around the tensor."""
    count = np.zeros([extent + 8 for extent in shape], np.int64)
    for offsets, sizes in boxes:
        count[slices(([begin + 4 for begin in offsets], sizes))] += 1
    inside = tuple(slice(4, 4 + extent) for extent in shape)
    return bool((count[inside] == 1).all()) and count.sum() == np.prod(shape)


@st.composite
def nearly_partitions(draw):
    """A partition, often with one box moved, grown, shrunk, dropped or doubled."""
    shape = draw(SHAPE)
    boxes = partition(shape, draw(st.integers(0, 2**32)), draw(st.integers(1, 12)))
    at = draw(st.integers(0, len(boxes) - 1))
    offsets, sizes = (list(numbers) for numbers in boxes[at])
    axis, change = draw(st.integers(0, len(shape) - 1)), draw(st.sampled_from([-1, 1]))
    kind = draw(st.sampled_from(["none", "move", "resize", "drop", "double", "two"]))
    if kind == "move" and offsets[axis] + change >= 0:
        offsets[axis] += change
    if kind in ("resize", "two") and sizes[axis] + change >= 1:
        sizes[axis] += change
    boxes[at] = tuple(offsets), tuple(sizes)
    if kind == "two" and len(boxes) > 1:
        boxes[at - 1] = boxes[at]
    if kind == "drop" and len(boxes) > 1:
        del boxes[at]
    if kind == "double":
        boxes.append(boxes[at])
    return boxes, shape


@settings(max_examples=500, deadline=None)
@given(nearly_partitions())
def test_a_cover_is_exact_if_and_only_if_every_element_is_counted_once(case):
    boxes, shape = case
    assert covers([box[0] for box in boxes], [box[1] for box in boxes], shape) == exact(boxes, shape)


def test_a_tensor_without_dimensions_has_one_box():
    assert covers([()], [()], ())
    assert not covers([(), ()], [(), ()], ())


@pytest.mark.parametrize("side", [16, 512])
def test_the_time_grows_with_the_number_of_boxes_alone(side):
    grid = [(row, column) for row in range(side) for column in range(side)]
    started = time.process_time()
    assert covers(grid, [(1, 1)] * len(grid), (side, side))
    assert time.process_time() - started < 4  # 512 x 512 take 0.3 s; every pair would take hours
    assert not covers([*grid[:-1], grid[0]], [(1, 1)] * len(grid), (side, side))


@given(SHAPE, st.data())
def test_a_run_is_what_lies_side_by_side_in_memory(shape, data):
    offsets = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
    sizes = tuple(data.draw(st.integers(1, extent - begin)) for begin, extent in zip(offsets, shape, strict=True))
    numbers = np.arange(np.prod(shape)).reshape(shape)[slices((offsets, sizes))].reshape(-1)
    start = run_start((offsets, sizes), shape)
    if (np.diff(numbers) == 1).all():
        assert start == numbers[0]
    else:
        assert start is None


@given(SHAPE, st.data())
def test_a_range_of_elements_is_a_few_boxes_in_their_order(shape, data):
    count = int(np.prod(shape))
    start = data.draw(st.integers(0, count - 1))
    stop = data.draw(st.integers(start + 1, count))
    numbers = np.arange(count).reshape(shape)
    found = list(parts(shape, start, stop))
    assert np.concatenate([numbers[slices(box)].reshape(-1) for box in found]).tolist() == list(range(start, stop))
    assert len(found) <= 2 * len(shape) + 1


@given(SHAPE, st.data())
def test_an_intersection_is_what_both_hold(shape, data):
    def box():
        offsets = tuple(data.draw(st.integers(0, extent - 1)) for extent in shape)
        return offsets, tuple(
            data.draw(st.integers(0, extent - begin)) for begin, extent in zip(offsets, shape, strict=True)
        )

    one, other = box(), box()
    marked = np.zeros((2, *shape), bool)
    marked[0][slices(one)] = True
    marked[1][slices(other)] = True
    both = np.zeros(shape, bool)
    hit = intersect(one, other)
    if hit is not None:
        both[slices(hit)] = True
    assert (both == marked.all(axis=0)).all()
    assert (hit is None) == (not marked.all(axis=0).any())
