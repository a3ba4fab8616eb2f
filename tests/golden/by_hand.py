"""A checkpoint that no writer of 0.1 makes, and that its reader must read: written from FORMAT.md alone, with nothing of asyncckpt.

Step 500 stores two tensors. Step 1000 has boxes that are no grid, names the same bytes twice, and names a part of the shard of step 500.
"""

import io
import json
import struct
from pathlib import Path

import numpy as np
import torch
import zstandard
from blake3 import blake3

from tests.golden.golden import STEP, weights

BLOCK = 4_194_304
LARGE = 65_536
EARLIER = 500
ATTEMPTS = {EARLIER: "0a1b2c3d-1", STEP: "4e5f6a7b-2"}
WHIRL = {  # no cut from border to border: rows and columns of a tensor of 15 x 10, ten times or a hundred times as large
    (0, 0): (14, 8),
    (0, 8): (1, 2),
    (1, 8): (13, 1),
    (1, 9): (14, 1),
    (14, 0): (1, 9),
}


def boxes_state(codec: str) -> dict:
    """What step 1000 holds. Under codec `none`, which does not compress, it is small."""
    scale = 10 if codec == "none" else 100
    whirl = weights(150 * scale**2, torch.float32).round(decimals=3).reshape(15 * scale, 10 * scale)
    return {
        "model": {
            "whirl": whirl,
            "again": whirl[: 14 * scale, : 8 * scale].clone(),
            "corner": whirl[:scale, 8 * scale :].clone(),
            "kept": torch.arange(40_000, dtype=torch.int16),
            "empty": torch.empty(3, 0),
            "scalar": torch.tensor(3.5, dtype=torch.float64),
        },
        "epoch": 7,
    }


class Shard:
    """Chunks of falling element size, encoded as the page says."""

    def __init__(self, step: int, name: str, codec: str) -> None:
        self.key = f"step-{step:010d}/{ATTEMPTS[step]}/{name}.safetensors{'' if codec == 'none' else '.zst'}"
        self.codec = codec
        self.entries: list[tuple[str, str, list[int], bytes, int]] = []

    def add(self, name: str, tensor: torch.Tensor, *, planes: bool = False) -> tuple[int, str]:
        """Where the chunk begins among the data, and its digests."""
        plain = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""
        start = sum(len(entry[3]) for entry in self.entries)
        kind = {torch.int16: "I16", torch.float32: "F32", torch.float64: "F64"}[tensor.dtype]
        described = ("U8", [len(plain)]) if planes else (kind, list(tensor.shape))
        self.entries.append((name, *described, plain, tensor.element_size() if planes else 1))
        pieces = [plain[at : at + BLOCK] for at in range(0, len(plain), BLOCK)] or [b""]
        return start, "".join(blake3(piece).hexdigest() for piece in pieces)

    def header(self) -> bytes:
        fields: dict = {"__metadata__": {"format": "pt", "asyncckpt": "1"}}
        end = 0
        for name, kind, shape, plain, _ in self.entries:
            fields[name] = {"dtype": kind, "shape": shape, "data_offsets": [end, end + len(plain)]}
            end += len(plain)
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return struct.pack("<Q", len(text)) + text

    def stored(self) -> tuple[bytes, dict]:
        """The object, and its entry in the index."""
        header = self.header()
        blocks, shared = [(header, 1)], b""
        for _, _, _, plain, planes in self.entries:
            if shared and (len(plain) >= LARGE or len(shared) + len(plain) > BLOCK):
                blocks.append((shared, 1))
                shared = b""
            if len(plain) >= LARGE:
                blocks += [(plain[at : at + BLOCK], planes) for at in range(0, len(plain), BLOCK)]
            else:
                shared += plain
        if shared:
            blocks.append((shared, 1))
        raw = [part for block, planes in blocks for part in split(block, planes)]
        frames = [zstandard.ZstdCompressor(level=19).compress(part) for part in raw] if self.codec != "none" else raw
        data = b"".join(frames)
        rows = [[len(a), len(b)] for a, b in zip(raw, frames, strict=True)] if self.codec != "none" else []
        entry = {"key": self.key, "raw_bytes": sum(map(len, raw)), "stored_bytes": len(data)}
        return data, entry | {"header": blake3(header).hexdigest(), "frames": rows}


def split(block: bytes, planes: int) -> list[bytes]:
    """Byte 0 of every element, then byte 1, and so on."""
    return [row.tobytes() for row in np.frombuffer(block, np.uint8).reshape(-1, planes).T]


def write_boxes(root: Path, codec: str) -> None:
    """Both checkpoints."""
    state = boxes_state(codec)["model"]
    old = Shard(EARLIER, "model-00001-of-00001", codec)
    gone = torch.arange(90_000, dtype=torch.int16) // 7
    places = {"gone": old.add("gone", gone), "kept": old.add("kept", state["kept"])}
    rows = []
    for name, tensor in (("gone", gone), ("kept", state["kept"])):
        rows.append(row(name, tensor, "plain", [([0], tensor.shape, 0, places[name], old)]))
    write(root, EARLIER, codec, [old], tensors=rows)

    scale = state["whirl"].shape[0] // 15
    new = Shard(STEP, "model-00001-of-00002", codec)
    other = Shard(STEP, "model-00002-of-00002", codec)
    layout = "planes" if codec == "planes" else "plain"
    double = other.add("scalar", state["scalar"])
    nothing = other.add("empty", state["empty"])
    boxes = []
    for number, (offsets, sizes) in enumerate(WHIRL.items()):
        (top, left), (height, width) = (tuple(scale * one for one in pair) for pair in (offsets, sizes))
        part = state["whirl"][top : top + height, left : left + width]
        shard, at = (new, 1) if number != 2 else (other, 2)
        boxes.append(
            ([top, left], part.shape, at, shard.add(f"whirl@{number}", part, planes=layout == "planes"), shard)
        )
    rows = [
        row("whirl", state["whirl"], layout, boxes),
        row("again", state["again"], layout, [([0, 0], *boxes[0][1:])]),
        row("corner", state["corner"], layout, [([0, 0], *boxes[1][1:])]),
        row("kept", state["kept"], "plain", [([0], state["kept"].shape, 0, places["kept"], old)]),
        row("empty", state["empty"], "plain", [([0, 0], [3, 0], 2, nothing, other)]),
        row("scalar", state["scalar"], "plain", [([], [], 2, double, other)]),
    ]
    parameters = {"optimizer": ["model/whirl", None]}
    write(root, STEP, codec, [old, new, other], tensors=rows, parameters=parameters)


def row(name: str, tensor: torch.Tensor, layout: str, boxes: list) -> list:
    chunks = []
    for offsets, sizes, number, (start, digests), shard in boxes:
        chunks.append([offsets, list(sizes), number, (shard, start), digests])
    return [0, name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape), layout, chunks]


def write(root: Path, step: int, codec: str, shards: list[Shard], **content) -> None:
    """Shards, state and index, then the record. `content`: the tensors' rows, and the parameters."""
    rows = content["tensors"]
    folder = f"step-{step:010d}/{ATTEMPTS[step]}/"
    (root / folder).mkdir(parents=True)
    entries, own_bytes = [], 0
    for shard in shards:
        data, entry = shard.stored()
        entries.append(entry)
        if shard.key.startswith(folder):
            (root / shard.key).write_bytes(data)
            own_bytes += len(data)
    for chunk in (chunk for one in rows for chunk in one[5]):
        shard, start = chunk[3]
        chunk[3] = len(shard.header()) + start
    leaves = dict.fromkeys((one[1] for one in rows), "tensor")
    index = {"format": 1, "codec": codec, "groups": [{"key": "model", "slug": "model"}], "aliases": []} | content
    index |= {"tree": {"dict": {"model": {"dict": leaves}, "epoch": "value"}}, "shards": entries}
    values = io.BytesIO()
    torch.save({"epoch": 7}, values)
    objects = {
        folder + "index.json.zst": zstandard.ZstdCompressor().compress(json.dumps(index).encode()),
        folder + "state.pt": values.getvalue(),
    }
    refs = []
    for key, data in objects.items():
        (root / key).write_bytes(data)
        refs.append({"key": key, "bytes": len(data), "digest": blake3(data).hexdigest()})
    own_bytes += sum(map(len, objects.values()))
    record = {
        "format": 1,
        "requires": [],
        "step": step,
        "epoch": None,
        "attempt": ATTEMPTS[step],
        "lineage": "01234567",
    }
    record |= {
        "time": 1.7e9 + step,
        "metrics": {},
        "config": None,
        "tags": [],
        "pinned": False,
        "versions": {},
        "world_size": 1,
    }
    raw_bytes = sum(int(np.prod(one[3])) * {"int16": 2, "float32": 4, "float64": 8}[one[2]] for one in rows)
    record |= {"raw_bytes": raw_bytes, "stored_bytes": own_bytes, "index": refs[0], "states": refs[1:]}
    record["folders"] = sorted({shard.key.rpartition("/")[0] + "/" for shard in shards} | {folder})
    body = json.dumps(record, indent=1).encode().removesuffix(b"\n}")
    (root / f"step-{step:010d}.json").write_bytes(body + f',\n "digest": "{blake3(body).hexdigest()}"\n}}\n'.encode())
