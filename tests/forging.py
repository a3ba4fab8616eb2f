"""Checkpoints that an enemy signed: any field of any object changed, under right digests; and what every reader makes of them.

python -m tests.forging --seed 17                    one case again
python -m tests.forging --seconds 600 --seed 1000    from that one on, for so long
"""

import argparse
import contextlib
import copy
import io
import json
import math
import pickle
import random
import struct
import sys
import tempfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import asyncckpt
from asyncckpt import Best, Run, errors
from asyncckpt.format import keys
from asyncckpt.format.digest import hexdigest
from asyncckpt.format.dtypes import DTYPES
from asyncckpt.format.frames import compress, decompress
from asyncckpt.format.nodes import SCALARS
from asyncckpt.format.record import sealed
from asyncckpt.store.memory import MemoryStore
from tests.records import fields_of
from tests.unit.engine.test_fetch_memory import resident_bytes
from tests.writer import write_checkpoint

URL = "memory://forged"
STEPS = (1, 2)
"""Both sound; the second is changed."""
CODECS = ("none", "planes", "zstd")
LONG_S, MUCH_BYTES = 10.0, 128 * 2**20
"""More than any forgery may take: its objects have less than a megabyte."""
DAMAGE = (errors.CorruptCheckpointError, errors.UnsafeCheckpointError)

_EXTREMES: tuple[Any, ...] = (
    *(
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        3,
        7,
        63,
        64,
        65,
        255,
        2**31,
        2**32 - 1,
        2**53,
        2**53 + 1,
        2**62,
        2**63,
        2**64,
        -(2**63),
    ),
    *(10**30, -(10**40), 10**310, 0.0, 0.5, -0.0, 1e308, 5e-324, 2.0**53),
    *(
        "",
        "x",
        "NaN",
        "Infinity",
        "\ud800",
        "\0",
        "é",
        "😀",
        "#0",
        "#9" + "9" * 30,
        "%",
        "%41",
        "a/b",
        "@",
        "../x",
        "tensor",
        "value",
    ),
    *(
        "bytes",
        "ndarray",
        "float32",
        "bfloat16",
        "complex32",
        "float4_e2m1fn_x2",
        "uint8",
        "bool",
        "int64",
        "float99",
        "plain",
        "planes",
    ),
    *(
        "none",
        "zstd",
        "model",
        "optimizer",
        "optimizer/state",
        "0" * 64,
        "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262",
    ),
    *("step-0000000002/aaaaaaaa-1/x", "step-0000000001/", "step-99999999999999999999/a/b"),
    *(
        [],
        {},
        [[]],
        [{}],
        {"": 0},
        [0],
        [[0, 0]],
        {"dict": {}},
        {"list": []},
        {"tuple": ["value"]},
        {"scalar": "float32"},
        {"scalar": "bool"},
    ),
    *(
        {"Counter": {"a": "value"}},
        {"OrderedDict": {"a": "tensor"}},
        {"dict": {"a": {"dict": {}}}},
        {"set": []},
        "ndarray",
        [0] * 65,
        [2**53] * 3,
    ),
)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        0,
        -1,
        2**31,
        2**63,
        10**400,
        0.5,
        float("nan"),
        float("inf"),
        1j,
        "",
        "x",
        "\ud800",
        b"x",
        b"\xff" * 100,
    ),
    *(
        [],
        (),
        [1],
        (1, 2),
        {1},
        set(),
        [None, "x"],
        torch.Size([2]),
        torch.Size([]),
        torch.float32,
        torch.device("cpu"),
        [[1]],
        {"a": 1},
    ),
)


class Model(nn.Module):
    """Tied weights, a buffer, and a tensor large enough for planes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.tied = nn.Linear(4, 3)
        self.tied.weight = self.first.weight
        self.large = nn.Parameter(torch.zeros(130, 128))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def state_of(step: int) -> dict[str, Any]:
    """A state with every kind of thing that a checkpoint holds."""
    torch.manual_seed(step)
    model = Model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    model.tied(model.first(torch.ones(2, 4)) @ torch.ones(3, 4)).sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    values = {
        "list": [1, "x", b"y"],
        "set": {1, 2},
        "size": torch.Size([2, 3]),
        "dtype": torch.bfloat16,
        "complex": 1j,
        "tuple": (1, 2),
    }
    arrays = {
        "array": np.arange(4.0),
        "scalar": np.float32(step),
        "small": np.int8(3),
        "list": [torch.ones(2), {"n": 1}],
    }
    bare = {"bare": torch.ones(3, dtype=torch.bfloat16), "empty": torch.zeros(0, 5), "step": step}
    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "values": values,
        "arrays": arrays,
        "rng": asyncckpt.RNG(),
        **bare,
    }


def fresh() -> dict[str, Any]:
    """Objects of a run that begins: its optimizer has no state yet, and takes what is read."""
    model = Model()
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


class Forgery:
    """A store with two checkpoints. The parts of the second may be changed: `record`, `index`, `headers` by key, and `pickled`."""

    def __init__(self, codec: str) -> None:
        self.store = MemoryStore()
        for step in STEPS:
            write_checkpoint(
                self.store,
                step,
                state_of(step),
                codec=codec,
                metrics={"loss": 1.0 / step},
                epoch=step,
                config={"lr": 0.1},
                shard_bytes=40_000,
            )
        self.record = fields_of(self._read(keys.record_key(2)))
        self.index = json.loads(decompress(self._read(self.record["index"]["key"]), 2**24))
        self.state = self._read(self.record["states"][0]["key"])
        self._objects = dict(self.store._objects)

    def _read(self, key: str) -> bytes:
        return self.store.get(key, max_bytes=2**30)

    def put(self, record: Any, index: Any, state: bytes) -> MemoryStore:
        """The store with this as its second checkpoint: every digest and size that follows is right."""
        self.store._objects.clear()
        self.store._objects.update(self._objects)
        record = copy.deepcopy(record)
        stored = index if isinstance(index, bytes) else compress(_json(index))
        for ref, data in ((record.get("index"), stored), (next(iter(_list(record.get("states"))), None), state)):
            if isinstance(ref, dict) and isinstance(ref.get("key"), str) and keys.parse_folder(ref["key"]) is not None:
                self.store.put(ref["key"], [data])
                ref.update(
                    {name: value for name, value in (("bytes", len(data)), ("digest", hexdigest(data))) if name in ref}
                )
        self.store.put(keys.record_key(2), [sealed(json.dumps(record, indent=1).encode() if record else b"{\n}")])
        return self.store


def _json(value: Any) -> bytes:
    return json.dumps(value).encode()


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every container inside, and each key or position in it."""
    todo = [value]
    while todo:
        inner = todo.pop()
        entries = (
            list(inner.items())
            if isinstance(inner, dict)
            else list(enumerate(inner))
            if isinstance(inner, list)
            else []
        )
        yield from ((inner, name) for name, _ in entries)
        todo += [child for _, child in entries]


def _change_json(source: random.Random, value: Any) -> str:
    """Change one place, by a value of another type, an extreme one, one from elsewhere, or by taking it away."""
    places = list(_places(value))
    place, name = source.choice(places)
    how = source.choice(["extreme", "extreme", "extreme", "near", "swap", "remove", "twice", "rename"])
    before = repr(place[name])[:60]
    if how == "extreme":
        place[name] = copy.deepcopy(source.choice(_EXTREMES))
    elif how == "near" and type(place[name]) is int:
        place[name] += source.choice([-1, 1, 4, -4, 64, 2**22, 2**40])
    elif how == "swap":
        other, at = source.choice(places)
        place[name] = copy.deepcopy(other[at])
    elif how == "remove":
        del place[name]
        return f"{name!r}: {before} taken out"
    elif how == "twice" and isinstance(place, list):
        place.insert(source.randrange(len(place) + 1), copy.deepcopy(place[name]))
    elif how == "rename" and isinstance(place, dict):
        place[str(source.choice(_EXTREMES))] = place.pop(name)
        return f"{name!r} renamed"
    return f"{name!r}: {before} -> {repr(place.get(name) if isinstance(place, dict) else place[name])[:60]}"


def _change_tensor(source: random.Random, index: dict[str, Any]) -> str:
    """Change a tensor so that the index still agrees with itself: what it says then reaches NumPy, torch and the objects."""
    row = source.choice(index["tensors"])
    name, dtype, shape = row[1], row[2], row[3]
    how = source.choice(["type", "leaf", "shape", "claim", "hollow"])
    if how == "type":
        row[2] = source.choice(
            [other for other, kind in DTYPES.items() if kind.element_bytes == DTYPES[dtype].element_bytes]
        )
        if not DTYPES[row[2]].planes:
            row[4] = "plain"
    elif how == "leaf":
        leaves = [(place, key) for place, key in _places(index["tree"]) if type(place[key]) is str]
        place, key = source.choice(leaves)
        place[key] = source.choice(["tensor", "ndarray", "bytes", "value", {"scalar": source.choice(sorted(SCALARS))}])
    elif how == "shape":
        count = math.prod(shape)
        row[3] = source.choice([[count], [1] * source.choice([1, 31, 32, 33, 60]) + shape, [*shape, 1], [1, count]])[
            :64
        ]
        row[5] = [[[0] * len(row[3]), row[3], *row[5][0][2:]]]
    elif how == "claim":
        size, shard = 2 ** source.randrange(23, 45), index["shards"][row[5][0][2]]
        row[2:] = [
            "uint8",
            [size],
            "plain",
            [[[0], [size], row[5][0][2], 2**16, "00" * 32 * min(-(-size // 2**22), 2**14)]],
        ]
        if not shard["frames"]:
            shard["raw_bytes"] = shard["stored_bytes"] = size + 2**17
        else:
            shard["frames"] = [
                shard["frames"][0],
                *[[2**22, source.choice([1, 100, 2**21])]] * min(size // 2**22 + 1, 2**14),
            ]
            shard["raw_bytes"], shard["stored_bytes"] = (sum(frame[at] for frame in shard["frames"]) for at in (0, 1))
        index["unknown"] = random.Random(size).randbytes(2**14).hex()  # or its text would be out of all proportion
    else:
        row[2:4] = [
            source.choice(sorted(DTYPES)),
            [source.choice([0, 1, 2, 2**20, 2**31, 2**53]) for _ in range(source.randrange(1, 5))],
        ]
        row[3][source.randrange(len(row[3]))] = 0
        row[4:] = ["plain", [[[0] * len(row[3]), row[3], *row[5][0][2:4], hexdigest(b"")]]]
    return f"{how} of {name}: {dtype} {shape} -> {str(row[2:4])[:80]}"


def _change_state(source: random.Random, state: bytes) -> tuple[bytes, str]:
    values = torch.load(io.BytesIO(state), weights_only=True)
    how = source.choice(["value", "value", "value", "opcodes", "opcodes", "archive"])
    if how == "value":
        path = source.choice(list(values))
        values[path] = source.choice(_VALUES)
        what = f"{path} = {values[path]!r}"[:100]
        return archive(pickle.dumps(values, protocol=source.choice([2, 2, 2, 4]))), what
    with zipfile.ZipFile(io.BytesIO(state)) as opened:
        data = bytearray(next(opened.read(name) for name in opened.namelist() if name.endswith("data.pkl")))
    if how == "archive":
        data = bytearray(state)
    for _ in range(source.choice([1, 1, 3])):
        at = source.randrange(len(data))
        change = source.choice(["byte", "opcode", "cut", "insert"])
        if change == "byte":
            data[at] = source.randrange(256)
        elif change == "opcode":
            data[at] = source.choice(b"(.0}]lt)\x85\x86\x87Rcbih\x81QPSUVX\x88\x89NKMJ\x8aGqrjeasu\x8f\x90\x91\x8b")
        elif change == "cut":
            del data[at : at + source.choice([1, 4, 100])]
        else:
            data[at:at] = source.choice(
                [b"R", b"h\x00", b"\x85R", b"]", b"(", b"\x8a\xff", struct.pack("<cI", b"X", 2**31)]
            )
    return (archive(bytes(data)) if how == "opcodes" else bytes(data)), f"{how} of the state file"


def archive(pickled: bytes) -> bytes:
    """A state file that holds this pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as made:
        made.writestr("archive/data.pkl", pickled)
        made.writestr("archive/byteorder", "little")
        made.writestr("archive/version", "3\n")
    return buffer.getvalue()


def forged(made: Forgery, seed: int) -> tuple[MemoryStore, str]:
    """The store of this seed, and what was changed."""
    source = random.Random(seed)
    record, index, state = copy.deepcopy(made.record), copy.deepcopy(made.index), made.state
    told = []
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        what = source.choice(["record", "index", "index", "index", "tensor", "tensor", "state"])
        if what == "state":
            state, change = _change_state(source, made.state)
            told.append(change)
        elif what == "tensor":
            with contextlib.suppress(
                KeyError, IndexError, TypeError, ValueError, AttributeError
            ):  # an earlier change broke it
                told.append(f"tensor: {_change_tensor(source, index)}")
        else:
            told.append(f"{what}: {_change_json(source, record if what == 'record' else index)}")
    return made.put(record, index, state), "; ".join(told)


def roads(store: MemoryStore, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every way to read the second checkpoint, by its number."""
    run = Run(URL, store=store)

    def tensors() -> None:
        found = run.get(2)
        for name in found.names():
            found.tensor(name)

    def export() -> None:
        run.get(2).export(folder / "weights.safetensors")

    return {
        "load": lambda: asyncckpt.load(URL, step=2, store=store),
        "part": lambda: asyncckpt.load(URL, step=2, prefix="optimizer", store=store),
        "restore": lambda: asyncckpt.restore(URL, state_of(9), step=2, store=store),
        "leniently": lambda: asyncckpt.restore(URL, state_of(9), step=2, strict=False, store=store),
        "fresh": lambda: asyncckpt.restore(URL, fresh(), step=2, store=store),
        "verify": lambda: run.get(2).verify(),
        "tensors": tensors,
        "export": export,
    }


def choices(store: MemoryStore) -> dict[str, Callable[[], Any]]:
    """Every way to read the best of what is there."""
    return {
        "latest": lambda: asyncckpt.load(URL, store=store),
        "best": lambda: asyncckpt.load(URL, step=Best("loss"), store=store),
        "restore latest": lambda: asyncckpt.restore(URL, state_of(9), store=store),
        "list": lambda: [one.step for one in Run(URL, store=store).checkpoints()],
        "rank": lambda: Run(URL, store=store).best("loss"),
    }


def is_told(error: BaseException) -> bool:
    """Whether an object's own `load_state_dict` refused a value of a type that it allows: no reader can know that before."""
    return (
        type(error) is errors.CheckpointError
        and ("loading the group" in str(error) or "load_state_dict() of" in str(error))
        and not isinstance(error.__cause__, DAMAGE)
    )


def complaint(road: Callable[[], Any], allowed: tuple[type[BaseException], ...]) -> str:
    """What a road raised that it must not; empty if all is well."""
    try:
        road()
    except allowed:
        return ""
    except Exception as error:
        return "" if is_told(error) else f"{type(error).__name__}: {error}"[:300]
    return ""


def try_seed(made: Forgery, seed: int, folder: Path) -> list[str]:
    """Read the forgery of this seed in every way; what went wrong, what took long, and what took much memory."""
    store, told = forged(made, seed)
    known = (*DAMAGE, errors.FormatVersionError, errors.StateMismatchError)
    chosen = (errors.FormatVersionError, errors.StateMismatchError)
    ways = {name: (road, known) for name, road in roads(store, folder).items()}
    ways |= {name: (road, chosen) for name, road in choices(store).items()}
    ways["export"] = (ways["export"][0], (*known, errors.UnsupportedTensorError))  # a type that safetensors lacks
    found = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, (road, allowed) in ways.items():
            started_s, before = time.process_time(), resident_bytes("VmRSS")
            Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
            found.append((name, complaint(road, allowed)))
            if (took_s := time.process_time() - started_s) > LONG_S:
                found.append((name, f"took {took_s:.1f} s"))
            if (took_bytes := resident_bytes("VmHWM") - before) > MUCH_BYTES:
                found.append((name, f"took {took_bytes / 2**20:.0f} MiB"))
    return [f"seed {seed}: {name}: {what} [{told}]" for name, what in found if what]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=float, default=0.0, help="go on with the next seeds for so long")
    options = parser.parse_args()
    end_s = time.monotonic() + options.seconds
    made = {codec: Forgery(codec) for codec in CODECS}
    seed, failures = options.seed, 0
    with tempfile.TemporaryDirectory() as folder:
        while True:
            for line in try_seed(made[CODECS[seed % len(CODECS)]], seed, Path(folder)):
                failures += 1
                print(line, flush=True)
            seed += 1
            if time.monotonic() >= end_s:
                break
    print(f"seeds {options.seed} to {seed - 1}: {failures} complaints")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
