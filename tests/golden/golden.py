"""The state of the golden checkpoints, by formula, and how they were written.

python -m tests.golden.golden tests/golden/v1      # once per format version, and never again for the same one
"""

import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import torch

import asyncckpt
from asyncckpt.format.dtypes import DTYPES

STEP = 1000
CODECS = ("planes", "zstd", "none")


def weights(count: int, dtype: torch.dtype) -> torch.Tensor:
    """Small floats that compress like weights, by integers and one division: the same bits on every machine."""
    number = torch.arange(count, dtype=torch.int64)
    spread = (number * 48271).remainder(65537) + (number * 69621).remainder(65521) - 65529
    return (spread.to(torch.float64) / 2**22).to(dtype)


def every_dtype() -> dict[str, torch.Tensor]:
    """Two rows of three elements of each dtype, from raw bytes, so that NaN payloads and odd bits are among them."""
    found = {}
    for name, kind in DTYPES.items():
        dtype = getattr(torch, name, None)
        if dtype is None:
            continue
        raw = torch.arange(6 * kind.element_bytes, dtype=torch.int64).mul(37).remainder(251).to(torch.uint8)
        if dtype is torch.bool:
            raw = raw.remainder(2)
        found[name] = raw.view(dtype).reshape(2, 3)
    return found


def state() -> dict:
    """What every later version must restore."""
    tied = weights(500, torch.float32).reshape(20, 25)
    return {
        "model": OrderedDict(
            {
                "large.fp32": weights(20_000, torch.float32).reshape(200, 100),
                "large.bf16": weights(40_000, torch.bfloat16),
                "large.fp64": weights(9_000, torch.float64),
                "tied.a": tied,
                "tied.b": tied,
                "empty": torch.empty(0, 3),
                "scalar": torch.tensor(3.5),
            }
        ),
        "dtypes": every_dtype(),
        "odd names": {
            "a/b": torch.tensor(1),
            "100%": torch.tensor(2),
            "#x": torch.tensor(3),
            "x@1": torch.tensor(4),
            "__metadata__": torch.tensor(5),
            "é": torch.tensor(6),
            "": torch.tensor(7),
            3: torch.tensor(8),
        },
        "values": {
            "int": 2**60,
            "float": 0.1,
            "nan": float("nan"),
            "text": "é",
            "none": None,
            "yes": True,
            "bytes": b"\x00\xff",
            "long bytes": bytes(range(256)) * 4096,
            "complex": 1 + 2j,
            "list": [1, 2.0, "x"],
            "tuple": (1, None),
            "nested": [{"deep": (torch.tensor(9), 10)}],
            "numpy": np.float32(0.25),
            "array": np.arange(5, dtype=np.uint16),
        },
        "bare": torch.arange(10),
        "epoch": 7,
    }


class Net(torch.nn.Module):
    """Two layers of equal shapes: what tells them apart is their name."""

    def __init__(self):
        super().__init__()
        self.first = torch.nn.Linear(6, 4)
        self.second = torch.nn.Linear(6, 4)
        with torch.no_grad():
            for number, parameter in enumerate(self.parameters(), 1):
                parameter.copy_(number * weights(parameter.numel(), torch.float32).reshape(parameter.shape))

    def optimizer(self, *, turned: bool = False) -> torch.optim.SGD:
        """`turned`: the second layer first."""
        layers = (self.second, self.first) if turned else (self.first, self.second)
        groups = [{"params": list(layer.parameters())} for layer in layers]
        return torch.optim.SGD(groups, lr=0.5, momentum=0.5)


def trained() -> dict:
    """A module and its optimizer after one step, which is exact: halves of small fractions of a power of two."""
    net = Net()
    optimizer = net.optimizer()
    for parameter in net.parameters():
        parameter.grad = parameter.detach() * 2
    optimizer.step()
    return {"net": net, "optimizer": optimizer}


def main(folder: Path) -> None:
    """Write one checkpoint a codec, and one by hand."""
    from tests.golden.by_hand import write_boxes  # it needs what stands above

    for codec in CODECS:
        write_boxes(folder / f"boxes-{codec}", codec)
    for codec in CODECS:
        with asyncckpt.Saver(folder / codec, codec=codec, config={"lr": 0.001}, workers=1) as saver:
            saver.save(STEP, state() | trained(), metrics={"loss": 0.5}, epoch=7, tags=("golden",), pin=True)
            saver.wait()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
