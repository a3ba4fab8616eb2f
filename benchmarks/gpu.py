"""What a save costs the training of a GPT on a CUDA device: stall, steps, copy rate beside the link's, durable, restore; peers beside.

    python -m benchmarks.gpu --json benchmarks/results/gpu.jsonl
    python -m benchmarks.gpu --peers asyncckpt,dcp-process --rounds 10 --store disk
    python -m benchmarks.gpu --width 4096 --layers 16                  # 3.2 G parameters, 39 GB of state
    python -m benchmarks.gpu --device cpu --width 64 --layers 2        # no figures worth keeping: does it run at all?

Needs a CUDA device, and says so and ends without one. The device holds three times the state and the gradients; the host one
snapshot a system and, in memory, one checkpoint. Every save is restored to the device and compared bit for bit.
"""

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks import peers, results
from benchmarks.arguments import count, device, file_to_append_to, folder, multiple, names_among
from benchmarks.reports import overview
from benchmarks.reports.lines import Line
from benchmarks.scenarios import gpu
from benchmarks.scenarios.base import Choices, Run

_MEMORY = Path("/dev/shm")


def main() -> int:
    args = _arguments()
    if args.device.type == "cuda" and not torch.cuda.is_available():
        print(
            "skipped: there is no CUDA device here (--device cpu shows that all of it runs, at no rates worth keeping)"
        )
        return 0
    origin = results.Origin("benchmarks.gpu", "the GPT as it trains")
    own_folder = Path(tempfile.mkdtemp(prefix="asyncckpt-gpu-", dir=args.folder))
    size = gpu.Size(width=args.width, layers=args.layers, batch=args.batch, window=args.window)
    try:
        with contextlib.ExitStack() as stack:
            context = Run(gpu.scenario(args.peers, args.rounds, args.store), Choices(folder=own_folder), stack)
            found = gpu.run(context, args.device, size)
    finally:
        shutil.rmtree(own_folder, ignore_errors=True)
    print(results.table(found) + "\n", flush=True)
    if args.json:
        results.append(args.json, found, origin)
    print(overview.table([Line.from_json(result.to_json()) for result in found]), flush=True)
    broken = any(result.error and result.peer.startswith("asyncckpt") for result in found)
    return int(broken or not any(result.measures for result in found))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    own = gpu.Size()
    parser.add_argument("--device", type=device, default="cuda", help="cuda, cuda:1, ..., or cpu")
    parser.add_argument(
        "--peers", type=names_among(peers.NAMES), default=gpu.PEERS, metavar="A,B", help=f"of {', '.join(peers.NAMES)}"
    )
    parser.add_argument("--rounds", type=count, default=4, help="saves of every system that count")
    parser.add_argument("--store", choices=("tmpfs", "disk"), default="tmpfs", help="where everybody saves")
    parser.add_argument("--width", type=multiple(64), default=own.width, help="of the GPT, a multiple of 64")
    parser.add_argument("--layers", type=count, default=own.layers)
    parser.add_argument("--batch", type=count, default=own.batch, help="sequences a step")
    parser.add_argument("--window", type=count, default=own.window, help="bytes of text in a sequence")
    parser.add_argument(
        "--folder",
        type=folder,
        default=_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir()),
        help="a folder of this run's own is made below it; default: /dev/shm",
    )
    parser.add_argument("--json", type=file_to_append_to, metavar="FILE", help="append one line of JSON a system")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
