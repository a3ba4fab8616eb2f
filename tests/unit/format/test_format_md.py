"""A shard is opened by others: the zstd command line tool, the safetensors library, and the lines of FORMAT.md."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors
import safetensors.numpy
import zstandard

import asyncckpt
import asyncckpt.format
from asyncckpt.format import limits, nodes
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import HEADER_WINDOW_BYTES, MAX_WINDOW_BYTES
from asyncckpt.format.plan import BLOCK_BYTES, LARGE_BYTES
from tests.programs import ZSTD, needs_zstd
from tests.unit.format.checkpoints import MIXED, store, structure_of
from tests.unit.format.document_reader import element_types, read_checkpoint
from tests.writer import tensor_bytes

FORMAT_MD = (Path(asyncckpt.format.__file__).parent / "FORMAT.md").read_text()
UNICODE = {"m": {"wörter/テンソル 🜚": ("float32", (2, 3)), "": ("int16", (4,)), '\x00\n"': ("uint8", (1,))}}


def unpack(stored, folder):
    """Every shard as a safetensors file; through the `zstd` tool where there is one."""
    for key, data in stored.objects.items():
        path = folder / key.rsplit("/", 1)[1]
        path.write_bytes(data)
        if path.suffix != ".zst":
            yield key, path
            continue
        plain = path.with_suffix("")
        if ZSTD:
            subprocess.run([ZSTD, "-d", "-q", path, "-o", plain], check=True)
        else:
            plain.write_bytes(zstandard.ZstdDecompressor().stream_reader(bytes(data), read_across_frames=True).read())
        yield key, plain


def lines_of_the_document():
    (code,) = re.findall(r"```python\n(.*?)```", FORMAT_MD, re.DOTALL)
    scope = {"numpy": np}
    exec(code, scope)
    return scope["join_planes"]


def read_by_the_document(stored, folder):
    """Path to plain bytes, as a reader does it who has only FORMAT.md."""
    join_planes = lines_of_the_document()
    index = json.loads(zstandard.ZstdDecompressor().decompress(stored.index))
    opened = {key: dict(safetensors.deserialize(path.read_bytes())) for key, path in unpack(stored, folder)}
    keys = [shard["key"] for shard in index["shards"]]
    values = {}
    for group, name, dtype, shape, layout, chunks in index["tensors"]:
        element = DTYPES[dtype].element_bytes
        whole = np.zeros([*shape, element], np.uint8)
        for number, (offsets, sizes, shard, _, _) in enumerate(chunks):
            described = opened[keys[shard]][name if len(chunks) == 1 else f"{name}@{number}"]
            data = bytes(described["data"])
            if layout == "planes":
                assert described["dtype"] == "U8"
                data = join_planes(data, element)
            elif DTYPES[dtype].safetensors:
                assert (described["dtype"], described["shape"]) == (DTYPES[dtype].safetensors, sizes)
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            whole[box] = np.frombuffer(data, np.uint8).reshape([*sizes, element])
        key = index["groups"][group]["key"]
        values[name if key is None else f"{key}/{name}"] = whole.tobytes()
    return values


@pytest.mark.parametrize("codec", ["planes", "zstd", "none"])
@pytest.mark.parametrize("shard_bytes", [None, 300_000])
@pytest.mark.parametrize("groups", [MIXED, UNICODE, {"m": {"w": ("float32", (2**20 + 7,))}}])
def test_shards_are_read_by_zstd_safetensors_and_the_documents_lines(tmp_path, codec, shard_bytes, groups):
    stored = store(structure_of(groups), codec, shard_bytes)
    values = read_by_the_document(stored, tmp_path)
    assert values == {stored.plan.structure.path(number): value for number, value in enumerate(stored.values)}


@needs_zstd
def test_the_zstd_tool_accepts_every_object(tmp_path):
    stored = store(structure_of(MIXED), "planes", 300_000)
    (tmp_path / "index.json.zst").write_bytes(stored.index)
    for key, data in stored.objects.items():
        (tmp_path / key.rsplit("/", 1)[1]).write_bytes(data)
    subprocess.run([ZSTD, "-t", "-q", *tmp_path.glob("*.zst")], check=True)
    text = subprocess.run([ZSTD, "-dc", tmp_path / "index.json.zst"], check=True, capture_output=True).stdout
    assert json.loads(text)["format"] == 1


def test_the_safetensors_loader_gives_the_tensors_of_codec_none(tmp_path):
    tensors = {"w": ("float32", (300, 70)), "i": ("int64", (5,)), "b": ("bool", (3,)), "e": ("float16", (0, 2))}
    stored = store(structure_of({"m": tensors}), "none")
    ((_, path),) = unpack(stored, tmp_path)
    with safetensors.safe_open(path, "np") as opened:
        assert opened.metadata() == {"format": "pt", "asyncckpt": "1"}
        loaded = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - it is no dict
    assert {name: (str(value.dtype), value.shape) for name, value in loaded.items()} == tensors
    assert [loaded[spec.name].tobytes() for spec in stored.plan.structure.tensors] == stored.values


def test_one_shot_decompression_stops_after_the_header_as_the_document_warns():
    stored = store(structure_of({"m": {"w": ("float32", (100,))}}))
    ((_, data),) = stored.objects.items()
    (shard,) = stored.plan.shards
    assert zstandard.ZstdDecompressor().decompress(bytes(data)) == shard.header
    with zstandard.ZstdDecompressor().stream_reader(bytes(data), read_across_frames=True) as reader:
        assert reader.read() == shard.header + stored.values[0]
    assert "read_across_frames=True" in FORMAT_MD


def test_the_document_states_the_constants_of_the_code():
    for constant in (BLOCK_BYTES, LARGE_BYTES, MAX_WINDOW_BYTES, HEADER_WINDOW_BYTES):
        assert f"{constant:,}" in FORMAT_MD
    assert {name: (kind.element_bytes, kind.safetensors) for name, kind in DTYPES.items()} == element_types()
    assert all(BLOCK_BYTES % kind.element_bytes == 0 for kind in DTYPES.values())
    for name in nodes.LEAVES | nodes.MAPPINGS | nodes.SEQUENCES | nodes.SCALARS:
        assert re.search(rf"\b{name}\b", FORMAT_MD)


def test_the_limits_of_the_document_are_those_of_the_code():
    table = FORMAT_MD[FORMAT_MD.index("## Limits") :]
    stated = [[cell.strip() for cell in line.split("|")[1:3]] for line in table.splitlines() if line.startswith("| ")][
        1:
    ]
    code = {name: value for name, value in vars(limits).items() if name.isupper()}
    ratio = f"{code.pop('INDEX_BASE_BYTES'):,} and {code.pop('INDEX_RATIO')} times the stored bytes"
    assert (code.pop("KEY_INT"), code.pop("CONFIG_INT"), code.pop("SIZE"), code.pop("STEP")) == (
        2**63,
        2**64,
        2**53,
        2**53,
    )
    assert code.pop("HOLLOW_BYTES") == 2**63 - 1
    powers = ["2^64", "2^63 - 1", "from -2^63 to 2^63 - 1", "from 0 to 2^53", ratio]
    assert sorted(value for _, value in stated) == sorted([*powers, *(f"{value:,}" for value in code.values())])


GOLDEN = Path(__file__).parents[2] / "golden" / "v1"


@pytest.mark.parametrize("folder", sorted(GOLDEN.iterdir()), ids=lambda path: path.name)
def test_a_reader_who_has_only_the_document_reads_every_golden_checkpoint(folder):
    steps = [int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.json")]
    assert steps
    for step in steps:
        values = read_checkpoint(folder, step)
        checkpoint = asyncckpt.Run(folder).get(step)
        assert set(values) == {*checkpoint._index.tensors, *checkpoint._index.aliases}
        for path, value in values.items():
            assert value.tobytes() == tensor_bytes(checkpoint.tensor(path)), path
