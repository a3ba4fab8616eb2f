"""Tensors in boxes of any kind, whole and in part: every piece is verified, and every byte comes where it belongs."""

import math

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt import errors
from asyncckpt.engine.direct import direct_paths
from asyncckpt.engine.fetch import fetch
from asyncckpt.engine.ranges import plan_fetch
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.limits import BLOCK_BYTES
from asyncckpt.store.memory import MemoryStore
from tests.boxes import partition, store_boxes
from tests.counting import CountingStore

CODECS = ["planes", "zstd", "none"]
DTYPE = st.sampled_from(["uint8", "bfloat16", "float32", "float64", "complex128"])
SMALL = st.lists(st.integers(0, 7), max_size=4).map(tuple)
LARGE = st.sampled_from([(300_000,), (700, 500), (40, 90, 80), (12, 30, 20, 40)])
SLOW = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large]
)


def random_values(shape, dtype, seed=0):
    """Elements as their bytes, the last dimension."""
    source = np.random.default_rng(seed)
    return source.integers(0, 5, (*shape, DTYPES[dtype].element_bytes), np.uint8)


def box_in(draw, shape):
    offsets = tuple(draw(st.integers(0, max(extent - 1, 0))) for extent in shape)
    return offsets, tuple(draw(st.integers(0, extent - begin)) for begin, extent in zip(offsets, shape, strict=True))


def part(values, box):
    return values[tuple(slice(begin, begin + size) for begin, size in zip(*box, strict=True))].tobytes()


@st.composite
def tensors(draw):
    found = {}
    for number in range(draw(st.integers(1, 3))):
        shape, dtype = draw(st.one_of(SMALL, LARGE)), draw(DTYPE)
        count = draw(st.integers(1, 7)) if math.prod(shape) else 1
        boxes = partition(shape, draw(st.integers(0, 2**32)), count)
        found[f"t{number}"] = (dtype, random_values(shape, dtype, number), boxes)
    return found


@SLOW
@given(made=tensors(), codec=st.sampled_from(CODECS), twice=st.booleans(), threads=st.sampled_from([1, 3]))
def test_any_boxes_come_back_bit_exact(made, codec, twice, threads):
    store = MemoryStore()
    index = store_boxes(store, codec, made, twice=twice)
    found = fetch(store, index, index.tensors, threads=threads).tensors
    assert {path: bytes(view) for path, view in found.items()} == {f"m/{n}": made[n][1].tobytes() for n in made}


@SLOW
@given(made=tensors(), codec=st.sampled_from(CODECS), data=st.data())
def test_any_part_of_a_tensor_in_any_boxes_comes_back_bit_exact(made, codec, data):
    store = CountingStore(MemoryStore())
    index = store_boxes(store, codec, made)
    boxes = {f"m/{name}": box_in(data.draw, values.shape[:-1]) for name, (_, values, _) in made.items()}
    own = {path for path in boxes if data.draw(st.booleans())}
    expected = {f"m/{name}": part(values, boxes[f"m/{name}"]) for name, (_, values, _) in made.items()}
    places = {path: memoryview(bytearray(len(expected[path]))) for path in own}
    fetched = fetch(store, index, boxes, boxes=boxes, places=places, threads=1)
    assert {path: bytes(view) for path, view in fetched.tensors.items()} == expected
    assert {path: bytes(place) for path, place in places.items()} == {path: expected[path] for path in own}
    assert fetched.requested_bytes == store.read_bytes


@pytest.mark.parametrize("codec", CODECS)
def test_only_the_pieces_that_a_box_touches_are_read(codec):
    values = random_values((16, 2**20 + 5), "float32")  # a row has two pieces
    store = CountingStore(MemoryStore())
    index = store_boxes(store, codec, {"t": ("float32", values, [((0, 0), (16, 2**20 + 5))])})
    window = ((9, 500), (1, 100))
    fetched = fetch(store, index, ["m/t"], boxes={"m/t": window})
    assert bytes(fetched.tensors["m/t"]) == part(values, window)
    (request,) = plan_fetch(index, ["m/t"], boxes={"m/t": window}).requests
    assert [block.stored.raw_bytes for block in request.blocks] == [BLOCK_BYTES]
    assert store.read_bytes == request.stored_bytes < BLOCK_BYTES + 1


@pytest.mark.parametrize("codec", CODECS)
def test_a_large_chunk_named_twice_is_read_once(codec):
    values = random_values((3, 2**20), "float32")
    whole = [((0, 0), (3, 2**20))]
    store = CountingStore(MemoryStore())
    made = {"a": ("float32", values, whole), "b": ("float32", values.copy(), whole)}
    index = store_boxes(store, codec, made, twice=True)
    fetched = fetch(store, index, ["m/a", "m/b"])
    assert bytes(fetched.tensors["m/a"]) == bytes(fetched.tensors["m/b"]) == values.tobytes()
    assert store.read_bytes <= index.shards[0].stored_bytes
    fetched.tensors["m/a"][0] ^= 1
    assert bytes(fetched.tensors["m/b"]) == values.tobytes()  # they are no alias


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("flipped", [0, 1, 2])
def test_a_flip_is_found_where_its_piece_is_read_and_nowhere_else(codec, flipped):
    values = random_values((3, 2**20), "float32")  # a row is a piece
    store = MemoryStore()
    index = store_boxes(store, codec, {"t": ("float32", values, [((0, 0), (3, 2**20))])})
    shard = index.shards[0]
    (request, *more) = plan_fetch(index, ["m/t"]).requests
    blocks = [block for one in (request, *more) for block in one.blocks]
    stored = blocks[flipped].stored
    data = bytearray(store.get(shard.key, max_bytes=2**30))
    data[stored.stored_offset + stored.stored_bytes // 2] ^= 0x10
    store.put(shard.key, [data])
    for row in range(3):
        window = {"m/t": ((row, 17), (1, 100))}
        if row == flipped:
            with pytest.raises(errors.CorruptCheckpointError) as caught:
                fetch(store, index, ["m/t"], boxes=window)
            assert caught.value.key == shard.key
        else:
            assert bytes(fetch(store, index, ["m/t"], boxes=window).tensors["m/t"]) == part(values, window["m/t"])
    with pytest.raises(errors.CorruptCheckpointError):
        fetch(store, index, ["m/t"])


@pytest.mark.parametrize(
    "box", [((0, 0), (3, 5)), ((0,), (3,)), ((-1, 0), (1, 1)), ((2, 0), (2, 4)), ((0, 0), (-1, 2))]
)
def test_a_box_outside_of_its_tensor_is_refused(box):
    store = MemoryStore()
    index = store_boxes(store, "zstd", {"t": ("uint8", random_values((3, 4), "uint8"), [((0, 0), (3, 4))])})
    with pytest.raises(ValueError, match="box"):
        fetch(store, index, ["m/t"], boxes={"m/t": box})


def test_tensors_in_boxes_that_are_no_runs_are_not_read_straight_into_place():
    class Rereading(MemoryStore):
        rereads = True

    store = Rereading()
    values = random_values((1024, 1024), "float32")
    made = {
        "runs": ("float32", values, [((0, 0), (512, 1024)), ((512, 0), (512, 1024))]),
        "columns": ("float32", values, [((0, 0), (1024, 512)), ((0, 512), (1024, 512))]),
    }
    assert direct_paths(store, store_boxes(store, "none", made), ["m/runs", "m/columns"]) == ["m/runs"]
