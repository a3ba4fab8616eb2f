"""A reader of checkpoints that knows FORMAT.md and nothing of `asyncckpt.format`. It checks what the page says must be checked."""

import json
import math
import re
from pathlib import Path

import numpy as np
import zstandard
from blake3 import blake3

PAGE = Path(__file__).parents[3] / "asyncckpt" / "format" / "FORMAT.md"
PIECE = 4_194_304
LARGE = 65_536


def element_types() -> dict[str, tuple[int, str | None]]:
    """dtype to its bytes and its name in a header, from the page's table."""
    text = PAGE.read_text()
    table = text[text.index("### Element types") : text.index("### Tree")]
    found = {}
    for line in table.splitlines():
        if not line.startswith("| `"):
            continue
        names, sizes, stored = (
            re.findall(r"[\w]+", cell.replace("which holds two", "")) for cell in line.split("|")[1:4]
        )
        bracketed = "(" in line
        for number, name in enumerate(names):
            size = int(sizes[min(number, len(sizes) - 1)])
            found[name] = (size, None if bracketed else stored[min(number, len(stored) - 1)])
    return found


def read_checkpoint(root: Path, step: int) -> dict[str, np.ndarray]:
    """Path of every tensor and alias to its bytes: an array of the tensor's shape and, last, the bytes of an element."""
    text = (root / f"step-{step:010d}.json").read_bytes()
    ending = f',\n "digest": "{blake3(text[:-82]).hexdigest()}"\n}}\n'.encode()
    assert text[-82:] == ending
    record = json.loads(text)
    assert (record["format"], record["requires"], record["step"]) == (1, [], step)
    own = f"step-{step:010d}/{record['attempt']}/"
    assert own in record["folders"]
    objects = (root / own).iterdir()
    assert record["stored_bytes"] == sum(path.stat().st_size for path in objects)
    for ref in (record["index"], *record["states"]):
        data = (root / ref["key"]).read_bytes()
        assert (len(data), blake3(data).hexdigest()) == (ref["bytes"], ref["digest"])
    index = json.loads(zstandard.ZstdDecompressor().decompress((root / record["index"]["key"]).read_bytes()))
    shards = [_Shard(root, row, index["codec"], record["folders"]) for row in index["shards"]]
    sizes = element_types()
    values, paths = {}, []
    for group, name, dtype, shape, layout, chunks in index["tensors"]:
        element = sizes[dtype][0]
        whole = np.zeros([*shape, element], np.uint8)
        count = np.zeros(shape, np.int8)
        assert [chunk[0] for chunk in chunks] == sorted(chunk[0] for chunk in chunks)
        for offsets, extent, shard, raw_offset, digests in chunks:
            plain = shards[shard].chunk(raw_offset, math.prod(extent) * element, element if layout == "planes" else 1)
            pieces = [plain[at : at + PIECE] for at in range(0, len(plain), PIECE)] or [b""]
            assert "".join(blake3(piece).hexdigest() for piece in pieces) == digests
            box = tuple(slice(begin, begin + size) for begin, size in zip(offsets, extent, strict=True))
            whole[box] = np.frombuffer(plain, np.uint8).reshape([*extent, element])
            count[box] += 1
        assert (count == 1).all()
        key = index["groups"][group]["key"]
        paths.append(name if key is None else f"{key}/{name}")
        values[paths[-1]] = whole
    for group, name, tensor in index["aliases"]:
        key = index["groups"][group]["key"]
        values[name if key is None else f"{key}/{name}"] = values[paths[tensor]]
    return values


class _Shard:
    def __init__(self, root: Path, row: dict, codec: str, folders: list[str]) -> None:
        assert row["key"].rpartition("/")[0] + "/" in folders
        self.data = (root / row["key"]).read_bytes()
        self.frames = row["frames"]
        self.framed = codec != "none"
        assert len(self.data) == row["stored_bytes"]
        header = self._header()
        assert blake3(header).hexdigest() == row["header"]
        if self.framed:
            assert [sum(column) for column in zip(*self.frames, strict=True)] == [row["raw_bytes"], row["stored_bytes"]]

    def _header(self) -> bytes:
        if self.framed:
            return self._decoded(0)[1]
        return self.data[: 8 + int.from_bytes(self.data[:8], "little")]

    def _decoded(self, number: int) -> tuple[int, bytes]:
        """Where a frame begins in the stream, and its bytes."""
        raw, stored = (sum(row[column] for row in self.frames[:number]) for column in (0, 1))
        raw_bytes, stored_bytes = self.frames[number]
        plain = zstandard.ZstdDecompressor().decompress(self.data[stored : stored + stored_bytes])
        assert len(plain) == raw_bytes
        return raw, plain

    def chunk(self, start: int, size: int, planes: int) -> bytes:
        """The plain bytes of a chunk."""
        if not self.framed or not size:
            return self.data[start : start + size]
        ends = np.cumsum([row[0] for row in self.frames])
        number = int(np.searchsorted(ends, start, side="right"))
        if size < LARGE:
            raw, plain = self._decoded(number)
            assert raw <= start
            assert start + size <= raw + len(plain)
            return plain[start - raw : start - raw + size]
        blocks = []
        for begin in range(start, start + size, PIECE):
            block = b""
            for plane in range(planes):
                raw, plain = self._decoded(number)
                assert plane > 0 or raw == begin
                block += plain
                number += 1
            assert len(block) == min(PIECE, start + size - begin)
            blocks.append(np.frombuffer(block, np.uint8).reshape(planes, -1).T.tobytes())
        return b"".join(blocks)
