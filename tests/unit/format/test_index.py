"""The index against what a hostile or broken store may serve."""

import copy
import json
import math
import time
import tracemalloc
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asyncckpt.errors import (
    CheckpointError,
    CorruptCheckpointError,
    FormatVersionError,
    RecordError,
    UnsafeCheckpointError,
)
from asyncckpt.format import keys, limits
from asyncckpt.format.frames import compress
from asyncckpt.format.index import BlockFinder, Index
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
    with pytest.raises((RecordError, FormatVersionError)):
        parse(changed(path, value))


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), ...),
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
        (("tensors", 0, 2), ["float32"]),
        (("tensors", 0, 2), "float64"),
        (("tensors", 0, 3), [60, 1001]),
        (("tensors", 0, 3), [60, 1000, 1]),
        (("tensors", 0, 4), ["plain"]),
        (("tensors", 1, 4), "planes"),
        (("tensors", 0, 5), []),
        ((*CHUNK, 0), [1, 0]),
        ((*CHUNK, 0), [0]),
        ((*CHUNK, 0), [30, 0]),
        ((*CHUNK, 1), [61, 1000]),
        ((*CHUNK, 1), [29, 1000]),
        ((*CHUNK, 3), 130_000),
        (("tensors", 0, 1), "half of a pair \ud800"),
        ((*CHUNK, 4), "00"),
        ((*CHUNK, 4), "zz" * 32),
        ((*CHUNK, 4), "AB" * 32),
        ((*CHUNK, 4), None),
        (("shards", 0, "header"), "00"),
        (("shards", 0, "frames"), []),
        (("shards", 0, "frames", 0), [0, 1, 0]),
        (("shards", 0, "frames", 1), [1, 0]),
        (("shards", 0, "frames", 1), [100_000]),
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


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("format",), 2),
        (("codec",), "lz4"),
        (("tensors", 0, 2), "float31"),
        (("tensors", 0, 3), [1] * 65),
        (("tensors", 0, 3, 0), 2**53 + 1),
        ((*CHUNK, 3), 2**53 + 1),
        (("shards", 0, "raw_bytes"), 2**53 + 1),
        (("shards", 0, "frames", 1, 1), 2**53 + 1),
        (("shards", 0, "frames", 1, 1), 2**70),
        (("groups", 0, "key"), f"#{2**63}"),
        (("tree",), {"dict": {f"#-{2**64}": "value"}}),
        (("tree",), {"dict": {"#" + "9" * 5000: "value"}}),
        (("tensors", 0, 4), "stripes"),
        (("tree",), "handle"),
        (("tree",), {"set": []}),
        (("tree",), {"dict": {"m": {"scalar": "float128"}}}),
    ],
)
def test_what_only_a_newer_version_can_mean_is_told_from_damage(path, value):
    with pytest.raises(FormatVersionError, match=r"newer asyncckpt.*Upgrade"):
        parse(changed(path, value))


@pytest.mark.parametrize(
    "tree",
    [
        *({"dict": []}, {"list": {}}, {"scalar": 1}, {"dict": {}, "list": []}, {}, {"list": [3]}),
        *({"dict": {key: "value"}} for key in ("a/b", "a@b", "#", "#01", "%zz", "\ud800", "__metadata__")),
    ],
    ids=repr,
)
def test_a_node_that_no_version_means_is_damage(tree):
    with pytest.raises(RecordError):
        parse(changed(("tree",), tree))


def test_the_leaf_of_bytes_is_known():
    tree = {"dict": {"m": {"list": ["bytes", "tensor", "ndarray", "value", {"scalar": "float16"}]}}}
    assert parse(changed(("tree",), tree)).tree == tree


def leaf(kind, dtype="float32", shape=(3,)):
    groups = {"m": {"x/a": (dtype, shape)}, 4: {"x/#0": (dtype, shape), "y": ("bool", ())}}
    tree = {
        "dict": {
            "m": {"dict": {"x": {"OrderedDict": {"a": kind}}}},
            "#4": {"dict": {"x": {"list": [kind]}, "y": "tensor"}},
        }
    }
    return index_json(store(structure_of(groups, [(0, "tied", 0)], tree=tree)))


def test_an_array_has_a_type_that_numpy_has():
    for dtype in ("float16", "bool", "complex128", "uint64"):
        assert parse(leaf("ndarray", dtype))
    for dtype in ("bfloat16", "float8_e5m2", "complex32"):
        with pytest.raises(RecordError, match="NumPy lacks") as caught:
            parse(leaf("ndarray", dtype))
        assert caught.value.key in ("m/x/a", "#4/x/#0")
    tied = leaf("tensor", "bfloat16")
    tied["tree"]["dict"]["m"]["dict"]["tied"] = "ndarray"
    with pytest.raises(RecordError, match="NumPy lacks") as caught:
        parse(tied)
    assert caught.value.key == "m/tied"


def test_bytes_are_a_row_of_bytes():
    assert parse(leaf("bytes", "uint8"))
    for dtype, shape in (("int8", (3,)), ("uint8", ()), ("uint8", (3, 1))):
        with pytest.raises(RecordError, match="as bytes"):
            parse(leaf("bytes", dtype, shape))


@pytest.mark.parametrize("shape", [[2**53, 2**53, 0], [0, 2**53, 2**8], [2**53, 0, 2**10], [2**40, 2**23, 0]])
def test_a_tensor_without_elements_whose_strides_no_reader_can_hold_is_refused(shape):
    data = index_json(store(structure_of({"m": {"w": ("float32", (0, 5))}})))
    row = data["tensors"][0]
    row[3], row[5][0][0], row[5][0][1] = shape, [0] * len(shape), shape
    with pytest.raises(FormatVersionError, match="without elements"):
        parse(data)
    shape[-1] = min(shape[-1], 2)
    shape[0] = min(shape[0], 2**30)
    shape[1] = min(shape[1], 2**30)
    assert torch.empty(parse(data).tensors["m/w"].shape).numpy().size == 0


def test_the_paths_that_go_by_rank_come_back():
    assert parse({**GOOD, "per_rank": ["loader"]}).per_rank == ("loader",)
    for wrong in ({}, "loader", [3]):
        with pytest.raises(RecordError):
            parse({**GOOD, "per_rank": wrong})


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
    with pytest.raises(FormatVersionError, match="nested"):
        parse(text)


def test_the_deepest_tree_is_read():
    assert parse({**GOOD, "tree": nested(254)})
    with pytest.raises(FormatVersionError, match="256 levels"):
        parse({**GOOD, "tree": nested(256)})


def test_too_many_values_are_refused_before_they_are_made():
    started = time.process_time()
    with pytest.raises(FormatVersionError, match="values"):
        parse(b"[" + b"[]," * 50_000_000 + b"[]]")
    assert time.process_time() - started < 5


def test_limits_on_tensors_and_bytes_hold(monkeypatch):
    monkeypatch.setattr(limits, "TENSORS", 8)
    many = store(structure_of({"m": {f"{number}": ("bool", ()) for number in range(9)}}))
    with pytest.raises(FormatVersionError, match="9 tensors"):
        parse(index_json(many))
    monkeypatch.setattr(limits, "INDEX_BYTES", 100)
    with pytest.raises(FormatVersionError, match="above 100"):
        parse(GOOD)


def test_an_index_whose_text_is_out_of_proportion_is_refused_before_it_takes_memory():
    text = json.dumps(GOOD).encode()
    assert Index.unpack(compress(text + b" " * (limits.INDEX_BASE_BYTES - len(text)))) == STORED.parsed
    padded = text + b" " * (8 * 2**20)
    stored = compress(padded)
    assert limits.INDEX_BASE_BYTES + limits.INDEX_RATIO * len(stored) < len(padded)
    with pytest.raises(FormatVersionError, match="above the limit"):
        Index.unpack(stored)


EMPTY = '{"format":1,"codec":"none","groups":[],"shards":[],"aliases":[],"tensors":[],"tree":%s%s}'
SWELLING = {
    **{f"unknown {unit}": ('"value"', ',"x":[' + unit * 40_000 + "0]") for unit in ("[],", "{},", "[[]],", "[{}],", '{"":1},', '{"":{}},', '{"a":1},', '"ab",', "1.5,", "999,")},
    "tree of lists": ('{"list":[' + '{"list":[]},' * 20_000 + '"value"]}', ""),
    "tree of dicts": ('{"dict":{' + ",".join(f'"{at:x}":{{"dict":{{}}}}' for at in range(20_000)) + "}}", ""),
    "deep tree": ('{"list":[' + ('{"list":[' * 100 + "]}" * 100 + ",") * 200 + '"value"]}', ""),
    "optimizers": ('"value"', ',"parameters":{' + ",".join(f'"{at:x}":[]' for at in range(30_000)) + "}"),
    "paths by rank": ('"value"', ',"per_rank":[' + '"ab",' * 60_000 + '""]'),
}  # fmt: skip


@pytest.mark.parametrize("name", SWELLING)
def test_parsing_takes_at_most_35_times_the_text(name):
    text = (EMPTY % SWELLING[name]).encode()
    tracemalloc.start()
    try:
        assert parse(text).tensors == {}
        assert tracemalloc.get_traced_memory()[1] < 35 * len(text) + 2**20
    finally:
        tracemalloc.stop()


def test_a_frame_larger_than_a_block_is_refused():
    data = copy.deepcopy(GOOD)
    row = data["shards"][0]
    header, raw_bytes = row["frames"][0], 2**40
    row["frames"] = [header, [raw_bytes - header[0], row["stored_bytes"] - header[1]]]
    row["raw_bytes"] = raw_bytes
    with pytest.raises(FormatVersionError, match="above"):
        parse(data)


def test_frames_that_are_no_planes_are_refused_when_read():
    row = GOOD["tensors"][0][5][0]
    data = changed((*CHUNK, 3), row[3] + 4)
    data["tensors"][0][5][0][1], data["tensors"][0][3] = [29, 1000], [59, 1000]
    data["tensors"][0][5][1][0] = [29, 0]
    index = parse(data)
    tensor = index.tensors["m/w"]
    with pytest.raises(CorruptCheckpointError, match="planes"):
        BlockFinder(index.shards[0]).blocks(tensor, tensor.chunks[0])


def cut(boxes, layout="plain") -> dict:
    """The good index with its first tensor, of 60 x 1000, in these boxes, side by side in its first shard."""
    data = copy.deepcopy(GOOD)
    shard, start = data["tensors"][0][5][0][2:4]
    data["shards"] = [
        {**row, "frames": [row["frames"][0], *[[2**22, 9]] * 9], "raw_bytes": 0, "stored_bytes": 0}
        for row in GOOD["shards"]
    ]
    for row in data["shards"]:
        row["raw_bytes"], row["stored_bytes"] = (sum(frame[n] for frame in row["frames"]) for n in (0, 1))
    rows = []
    for offsets, sizes in boxes:
        rows.append([offsets, sizes, shard, start, "ab" * 32])
        start += 4 * math.prod(sizes)
    data["tensors"][0][4:] = [layout, rows]
    return data


GRID = [([r, c], [20, 500]) for r in (0, 20, 40) for c in (0, 500)]
WHIRL = [
    ([0, 0], [20, 600]),
    ([0, 600], [40, 400]),
    ([20, 0], [40, 400]),
    ([20, 400], [20, 200]),
    ([40, 400], [20, 600]),
]


@pytest.mark.parametrize("boxes", [GRID, WHIRL, [([0, 0], [60, 1]), ([0, 1], [60, 999])]])
def test_any_boxes_that_hold_each_element_once_are_read(boxes):
    assert [([*c.offsets], [*c.sizes]) for c in parse(cut(boxes)).tensors["m/w"].chunks] == boxes


@pytest.mark.parametrize(
    "boxes",
    [
        GRID[1:],
        GRID[:-1],
        [*GRID[:3], ([20, 499], [20, 501]), *GRID[4:]],
        [*GRID[:5], ([40, 501], [20, 499])],
        [*GRID[:5], ([40, 500], [21, 500])],
        [*WHIRL[:3], ([20, 401], [20, 199]), WHIRL[4]],
        [*WHIRL[:3], ([20, 400], [20, 0]), WHIRL[4]],
        [([0, 0], [60, 1000]), ([10, 10], [1, 1])],
        [([0, 0], [60, 999])],
        [([0, 1], [60, 999])],
        [([0], [60000])],
        [([0, 0, 0], [60, 1000, 1])],
    ],
)
def test_a_hole_or_an_overlap_between_boxes_is_refused(boxes):
    with pytest.raises(RecordError, match=r"exactly once|rank|nothing"):
        parse(cut(boxes))


def test_boxes_stand_in_the_order_of_their_offsets():
    for boxes in (GRID[::-1], [GRID[0], GRID[0], *GRID[1:]]):
        with pytest.raises(RecordError, match="order"):
            parse(cut(boxes))


def test_two_chunks_name_the_same_bytes_or_none_in_common():
    for layout, second, fits in (
        ("plain", [[500, 0], [500, 1000], 0, 0], True),
        ("plain", [[500, 0], [500, 1000], 0, 4], False),
        ("plain", [[500, 0], [500, 1000], 0, 2_000_000], True),
        ("plain", [[500, 0], [500, 1000], 0, 1_999_999], False),
    ):
        data = cut([([0, 0], [500, 1000])], layout)
        first = data["tensors"][0][5][0]
        second[3] += first[3]
        data["tensors"][0][3] = [1000, 1000]
        data["tensors"][0][5].append([*second, "ab" * 32])
        if fits:
            assert len(parse(data).tensors["m/w"].chunks) == 2
        else:
            with pytest.raises(RecordError, match="overlap"):
                parse(data)
    data = cut([([0, 0], [500, 1000])])
    data["tensors"][0][3] = [500, 1000]
    row = data["tensors"][0][5][0]
    same_bytes = [0, "v", "int16", [1000, 1000], "plain", [[[0, 0], [1000, 1000], *row[2:]]]]
    data["tensors"].append(same_bytes)
    with pytest.raises(RecordError, match="overlap"):
        parse(data)  # of another element size
    same_bytes[2:4], same_bytes[5][0][1] = ["int32", [500, 1000]], [500, 1000]
    assert len(parse(data).tensors) == 4


def test_no_chunk_lies_in_a_header():
    data = cut([([0, 0], [60, 1000])])
    header = data["shards"][0]["frames"][0][0]
    data["tensors"][0][5][0][3] = header
    assert parse(data)
    data["tensors"][0][5][0][3] = header - 1
    with pytest.raises(RecordError, match="header"):
        parse(data)


def test_a_tensor_without_elements_has_one_chunk_with_the_digest_of_nothing():
    stored = store(structure_of({"m": {"e": ("float32", (3, 0, 2))}}))
    data = index_json(stored)
    row = data["tensors"][0][5][0]
    assert row[:2] == [[0, 0, 0], [3, 0, 2]]
    assert row[4].startswith("af1349b9")
    row[4] = "ab" * 32
    with pytest.raises(RecordError, match="nothing"):
        parse(data)


@pytest.mark.parametrize("elements", [2**20 - 1, 2**20, 2**20 + 1, 3 * 2**20])
def test_a_chunk_has_a_digest_for_every_four_mebibytes(elements):
    data = cut([([0, 0], [1, elements])])
    data["tensors"][0][3] = [1, elements]
    row = data["tensors"][0][5][0]
    count = max(1, -(-4 * elements // 2**22))
    row[4] = "".join(f"{number:064x}" for number in range(count))
    (chunk,) = parse(data).tensors["m/w"].chunks
    assert [chunk.digest(number)[-1] for number in range(count)] == list(range(count))
    for wrong in (row[4][:-64], row[4] + "ab" * 32, row[4][:-1], row[4].upper()[:-2] + "AB", row[4][:-2] + " 1"):
        row[4] = wrong
        with pytest.raises(RecordError, match="digest"):
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
    good = Receipt(0, FOLDER + shard.name, shard.raw_bytes, 5, ((shard.raw_bytes, 5),))
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
        frames = ((len(shard.header), 3), (shard.raw_bytes - len(shard.header), stored_bytes - 3))
        receipt = Receipt(0, FOLDER + shard.name, shard.raw_bytes, stored_bytes, frames)
        digests = bytes([number]) * 32 + bytes([number + 10]) * 32
        index = parse(builder.build([receipt], digests, FOLDER))
        found = {chunk.digests for tensor in index.tensors.values() for chunk in tensor.chunks}
        assert found == {digests[:32], digests[32:]}
        assert index.shards[0].stored_bytes == stored_bytes


def test_a_shard_of_an_earlier_step_may_be_named():
    layout = plan(structure_of({"m": {"w": ("bool", ())}}))
    shard = layout.shards[0]
    key = keys.folder(3, "feed-1") + shard.name
    receipt = Receipt(0, key, shard.raw_bytes, 5, ((len(shard.header), 4), (1, 1)))
    assert parse(IndexBuilder(layout).build([receipt], bytes(32), FOLDER)).shards[0].key == key


def test_an_index_of_256000_chunks_is_parsed_in_seconds_and_in_little_memory():
    shard_count, tensors, chunk_bytes = 64, 4000, 131_072
    frames = [[1000, 400], *[[chunk_bytes // 4, 30_000]] * (4 * tensors)]
    sizes = {"raw_bytes": 1000 + tensors * chunk_bytes, "stored_bytes": 400 + 4 * tensors * 30_000}
    keys_of = [f"step-0000001000/0a1b2c3d-4/m-{number}" for number in range(shard_count)]
    rows = [
        [[[64 * shard, 0], [64, 512], shard, 1000 + chunk_bytes * tensor, "ab" * 32] for shard in range(shard_count)]
        for tensor in range(tensors)
    ]
    shape = [64 * shard_count, 512]
    data = {
        "format": 1,
        "codec": "planes",
        "groups": [{"key": "m", "slug": "m"}],
        "shards": [{"key": key, "header": "ab" * 32, "frames": frames, **sizes} for key in keys_of],
        "tensors": [[0, f"t{number}", "float32", shape, "planes", chunks] for number, chunks in enumerate(rows)],
        "aliases": [],
        "tree": {"dict": {"m": {"dict": {f"t{number}": "tensor" for number in range(tensors)}}}},
    }
    text = json.dumps(data, separators=(",", ":")).encode()
    del data, rows
    started = time.process_time()
    index = Index.parse(text)
    assert time.process_time() - started < 10  # 1.9 s on an idle core
    assert sum(len(tensor.chunks) for tensor in index.tensors.values()) == 256_000
    assert sum(shard.frames.raw.nbytes + shard.frames.stored.nbytes for shard in index.shards) < 17 * 2**20
