"""The index against what a hostile or broken store may serve."""

import copy
import json
import time
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    RecordError,
    ResourceLimitError,
    UnsafeCheckpointError,
)
from asyncckpt.format import index as indexes
from asyncckpt.format import keys
from asyncckpt.format.index import Index, blocks_of
from asyncckpt.format.index_builder import IndexBuilder
from asyncckpt.format.plan import plan
from asyncckpt.format.structure import Structure
from tests.unit.format.checkpoints import FOLDER, Receipt, index_json, load, store, structure_of

STORED = store(
    structure_of({"m": {"w": ("float32", (60, 1000)), "b": ("int8", (5,))}, 4: {"x": ("bfloat16", ())}}, [(0, "t", 0)]),
    "planes",
    130_000,
)
GOOD = index_json(STORED)


def parse(data) -> Index:
    return Index.parse(data if isinstance(data, bytes) else json.dumps(data).encode())


def changed(path, value) -> dict:
    """The good index with one place replaced, or taken out."""
    data = copy.deepcopy(GOOD)
    place = data
    for step in path[:-1]:
        place = place[step]
    if value is ...:
        del place[path[-1]]
    else:
        place[path[-1]] = value
    return data


def nested(levels):
    tree = {"list": []}
    for _ in range(levels // 2):
        tree = {"list": [tree]}
    return tree


def test_the_good_index_parses():
    assert parse(GOOD) == STORED.parsed
    assert GOOD["tensors"][0][5][1][:2] == [[30, 0], [30, 1000]]


WRONG_SIZES = [-1, 2**53 + 1, 2**63, 10**30, 1.0, True, None, "1", [], {}]
CHUNK = ("tensors", 0, 5, 0)


@pytest.mark.parametrize("value", WRONG_SIZES)
@pytest.mark.parametrize(
    "path",
    [
        ("shards", 0, "raw_bytes"),
        ("shards", 0, "stored_bytes"),
        ("shards", 0, "frames", 1, 0),
        ("shards", 0, "frames", 1, 1),
        ("shards", 0, "frames", 1, 3),
        ("tensors", 0, 0),
        ("tensors", 0, 3, 0),
        (*CHUNK, 0, 0),
        (*CHUNK, 1, 1),
        (*CHUNK, 2),
        (*CHUNK, 3),
        ("aliases", 0, 2),
    ],
)
def test_a_number_that_cannot_be_is_refused(path, value):
    with pytest.raises((RecordError, ResourceLimitError)):
        parse(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), ...),
        (("codec",), "lz4"),
        (("codec",), "none"),
        (("codec",), "zstd"),  # a tensor has layout planes
        (("groups",), {}),
        (("groups", 0, "key"), 5),
        (("groups", 0, "key"), "a@b"),
        (("groups", 1, "key"), "m"),
        (("groups",), []),
        (("tensors",), ...),
        (("tensors", 0), []),
        (("tensors", 0), {"group": 0}),
        (("tensors", 0, 0), 2),
        (("tensors", 0, 1), 7),
        (("tensors", 1, 1), "w"),
        (("tensors", 0, 2), "float31"),
        (("tensors", 0, 2), ["float32"]),
        (("tensors", 0, 2), "float64"),
        (("tensors", 0, 3), [60, 1001]),
        (("tensors", 0, 3), [60, 1000, 1]),
        (("tensors", 0, 3), [1] * 65),
        (("tensors", 0, 4), "stripes"),
        (("tensors", 1, 4), "planes"),
        (("tensors", 0, 5), []),
        ((*CHUNK, 0), [1, 0]),
        ((*CHUNK, 0), [0]),
        ((*CHUNK, 0), [30, 0]),
        ((*CHUNK, 1), [61, 1000]),
        ((*CHUNK, 1), [29, 1000]),
        ((*CHUNK, 3), 130_000),
        ((*CHUNK, 4), "00"),
        ((*CHUNK, 4), "zz" * 32),
        ((*CHUNK, 4), "AB" * 32),
        ((*CHUNK, 4), None),
        (("shards", 0, "header"), "00"),
        (("shards", 0, "frames"), []),
        (("shards", 0, "frames", 0), [0, 1, 0]),
        (("shards", 0, "frames", 1), None),
        (("aliases", 0), [0, "w", 0]),
        (("aliases", 0), ["m", "t", 0]),
        (("aliases", 0, 2), 3),
        (("tree",), 5),
        (("tree",), ...),
    ],
)
def test_a_contradiction_is_refused(path, value):
    with pytest.raises(RecordError):
        parse(changed(path, value))


@pytest.mark.parametrize("key", ["/etc/passwd", "../x", "step-0000000007/../x", "s3://b/step-0000000007/a/b", ""])
def test_a_shard_outside_of_the_checkpoints_is_refused(key):
    with pytest.raises(UnsafeCheckpointError):
        parse(changed(("shards", 0, "key"), key))


def test_an_unknown_version_is_refused_and_says_to_upgrade():
    with pytest.raises(FormatVersionError, match="upgrade"):
        parse(changed(("format",), 2))


def test_the_names_of_an_optimizers_parameters_come_back():
    names = {"optimizer": ("m/w", None), "other": ()}
    structure = replace(structure_of({"m": {"w": ("float32", (3,))}}), parameters=names)
    assert Structure.from_json(json.loads(json.dumps(structure.to_json()))).parameters == names
    stored = store(structure)
    assert stored.parsed.parameters == names
    assert "parameters" not in index_json(store(structure_of({"m": {"w": ("float32", (3,))}})))
    for wrong in ([], {"optimizer": "m/w"}, {"optimizer": [0]}):
        with pytest.raises(RecordError):
            parse({**index_json(stored), "parameters": wrong})


def test_unknown_fields_are_ignored():
    data = copy.deepcopy(GOOD) | {"later": [1, 2]}
    data["shards"][0]["later"] = True
    assert parse(data) == STORED.parsed


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"[]",
        b"null",
        b"\xff",
        b'{"format": 1, "format": 1}',
        b'{"format": NaN}',
        b'{"format": 1e999}',
        b'{"format": 1',
        b'{"format": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_json_object_is_refused(text):
    with pytest.raises(RecordError):
        parse(text)


@pytest.mark.parametrize(
    "text",
    [
        b"[" * 100_000,
        b'{"tree":' * 100_000,
        json.dumps({**GOOD, "tree": nested(300)}).encode(),
    ],
)
def test_deep_nesting_is_refused(text):
    with pytest.raises(ResourceLimitError):
        parse(text)


def test_too_many_values_are_refused_before_they_are_made():
    started = time.process_time()
    with pytest.raises(ResourceLimitError, match="values"):
        parse(b"[" + b"[]," * 50_000_000 + b"[]]")
    assert time.process_time() - started < 5


def test_limits_on_tensors_and_bytes_hold(monkeypatch):
    monkeypatch.setattr(indexes, "MAX_TENSORS", 8)
    many = store(structure_of({"m": {f"{number}": ("bool", ()) for number in range(9)}}))
    with pytest.raises(ResourceLimitError, match="9 tensors"):
        parse(index_json(many))
    monkeypatch.setattr(indexes, "MAX_INDEX_BYTES", 100)
    with pytest.raises(ResourceLimitError, match="above 100"):
        parse(GOOD)


def test_a_frame_larger_than_a_block_is_refused():
    data = copy.deepcopy(GOOD)
    row = data["shards"][0]
    header, raw_bytes = row["frames"][0], 2**40
    row["frames"] = [header, [header[1], raw_bytes - header[1], header[3], row["stored_bytes"] - header[3]]]
    row["raw_bytes"] = raw_bytes
    with pytest.raises(ResourceLimitError, match="limit"):
        parse(data)


def test_frames_that_are_no_planes_are_refused_when_read():
    index = parse(changed((*CHUNK, 3), 100))
    tensor = index.tensors["m/w"]
    with pytest.raises(CorruptCheckpointError, match="planes"):
        blocks_of(index, tensor, tensor.chunks[0])


def test_chunks_of_a_grid_along_two_axes_are_accepted_and_overlaps_are_not():
    data = copy.deepcopy(GOOD)
    shard, start, digits = data["tensors"][0][5][0][2:]
    data["tensors"][0][4] = "plain"
    boxes = [([r, c], [20, 500]) for r in (0, 20, 40) for c in (0, 500)]
    data["tensors"][0][5] = [[offsets, sizes, shard, start, digits] for offsets, sizes in boxes]
    assert len(parse(data).tensors["m/w"].chunks) == 6
    data["tensors"][0][5][1][0] = [0, 250]
    with pytest.raises(RecordError, match="grid"):
        parse(data)
    data["tensors"][0][5][1] = data["tensors"][0][5][0]
    with pytest.raises(RecordError, match="grid"):
        parse(data)


JUNK = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-3, 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)


def places(value, here=()):
    yield here
    children = enumerate(value) if isinstance(value, list) else value.items() if isinstance(value, dict) else ()
    for step, child in children:
        yield from places(child, (*here, step))


PLACES = [place for place in places(GOOD) if place]


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(st.sampled_from(PLACES), JUNK)
def test_junk_anywhere_never_escapes_the_error_family(place, junk):
    try:
        index = parse(changed(place, junk))
        objects = {shard.key: bytes(10**6) for shard in index.shards} | STORED.objects
        for path in [*index.tensors, *index.aliases]:
            load(index, objects, path)
    except CheckpointError:
        return


def test_a_receipt_that_does_not_fit_raises():
    layout = plan(structure_of({"m": {"w": ("bool", ())}}))
    shard = layout.shards[0]
    good = Receipt(0, FOLDER + shard.name, shard.raw_bytes, 5, ((0, shard.raw_bytes, 0, 5),))
    assert IndexBuilder(layout).build([good], bytes(32), FOLDER)
    for receipts in (
        [],
        [good, good],
        [Receipt(0, good.key, good.raw_bytes + 1, 5, good.frames)],
        [Receipt(0, FOLDER + "other", good.raw_bytes, 5, good.frames)],
    ):
        with pytest.raises(ValueError, match="receipt"):
            IndexBuilder(layout).build(receipts, bytes(32), FOLDER)
    with pytest.raises(ValueError, match="digests"):
        IndexBuilder(layout).build([good], bytes(31), FOLDER)


def test_each_index_of_a_builder_has_its_own_digests_and_shards():
    layout = plan(structure_of({"m": {"w": ("bool", ()), "v": ("bool", (3,))}}))
    shard = layout.shards[0]
    builder = IndexBuilder(layout)
    for number, stored_bytes in ((1, 5), (2, 6)):
        receipt = Receipt(
            0, FOLDER + shard.name, shard.raw_bytes, stored_bytes, ((0, shard.raw_bytes, 0, stored_bytes),)
        )
        digests = bytes([number]) * 32 + bytes([number + 10]) * 32
        index = parse(builder.build([receipt], digests, FOLDER))
        found = {chunk.digest for tensor in index.tensors.values() for chunk in tensor.chunks}
        assert found == {digests[:32], digests[32:]}
        assert index.shards[0].stored_bytes == stored_bytes


def test_a_shard_of_an_earlier_step_may_be_named():
    layout = plan(structure_of({"m": {"w": ("bool", ())}}))
    shard = layout.shards[0]
    key = keys.folder(3, "feed-1") + shard.name
    receipt = Receipt(0, key, shard.raw_bytes, 5, ((0, len(shard.header), 0, 4), (len(shard.header), 1, 4, 1)))
    assert parse(IndexBuilder(layout).build([receipt], bytes(32), FOLDER)).shards[0].key == key
