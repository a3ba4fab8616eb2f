"""Where the time of a save and of a restore goes, stage by stage, each alone and beside its limit.

    python -m benchmarks.stages                                   # 1 GB, in memory; about five minutes on two cores
    python -m benchmarks.stages --store sink                      # and puts to an S3 server on loopback
    python -m benchmarks.stages --size 0.1 --rounds 1             # a tenth of the bytes: does it run at all?
    python -m benchmarks.stages --json stages.jsonl               # keep the figures

Run from the root of the repository, on a machine that does nothing else. At 1 GB it wants 6 GB of memory.
"""

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from asyncckpt.engine.arena import Arena
from asyncckpt.format.plan import plan as lay_out
from asyncckpt.state.tree import Flattener
from benchmarks.measure import Observer
from benchmarks.results import machine
from benchmarks.stages import codec, memory, restoring, saving
from benchmarks.stages.base import Bench, Stage, table
from benchmarks.states import DENSE, build
from benchmarks.stores import NAMES, open_store
from benchmarks.trained import trained

_MEMORY = Path("/dev/shm")


def main() -> int:
    args = _arguments()
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-stages-", dir=args.folder))
    observer = Observer()
    try:
        found = []
        for stage in _stages(Bench(round(args.size * 1e9), args.rounds, folder, args.store)):
            print(f"{stage.group}: {stage.name}: {stage.s_per_gb:.3g} s per GB", file=sys.stderr, flush=True)
            found.append(stage)
    finally:
        shutil.rmtree(folder)
    about = {
        "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "command": " ".join(["python", "-m", "benchmarks.stages", *sys.argv[1:]]),
        "foreign_cores": observer.stop().foreign_cores,
        "values": trained().source,
        "machine": machine(),
    }
    print(_heading(about))
    print()
    print(table(found))
    if args.json:
        with args.json.open("a") as file:
            file.writelines(json.dumps(stage.to_json() | about) + "\n" for stage in found)
    return 0


def _stages(bench: Bench) -> Iterator[Stage]:
    """All of them, in the order of a save and then of a restore."""
    state = build(DENSE.resized(bench.state_bytes / DENSE.raw_bytes))
    walk = Flattener()
    flat = walk.flatten(state.objects)
    plan = lay_out(flat.structure)
    known = memory.measure(bench, torch.ones(state.raw_bytes, dtype=torch.uint8))
    yield from known.values()
    arena = Arena.create(0, plan.arena_bytes)
    arena.touch()
    copies = memory.snapshot(bench, flat.tensors, plan, arena, known["memcpy"])
    yield from copies
    known["copy"] = copies[-1]
    yield bench.stage("Before the copy", "walk the state again", lambda: walk.flatten(state.objects), moved_bytes=0)
    yield bench.stage("Before the copy", "plan of a new state", lambda: lay_out(flat.structure), moved_bytes=0)
    buffer = memoryview(arena.buffer)
    known |= codec.parts(bench, plan, buffer, known["memcpy"], known["read"])
    yield from (stage for stage in known.values() if stage.group == codec.PARTS)
    yield from codec.of_planes(bench, known["memcpy"])
    plans = {"planes": plan} | {name: lay_out(flat.structure, codec=name) for name in ("zstd", "none")}
    encoded, stored = codec.whole(bench, plans, buffer, known)
    yield from encoded
    snapshot = saving.Encoded(plan, buffer, stored)
    for name in dict.fromkeys(("tmpfs", bench.store)):
        if name is not None:
            with open_store(name, bench.folder) as store:
                yield from saving.saving(bench, name, store.place("stages"), snapshot, known)
                place = store.place("whole")
                yield from saving.saves(bench, name, place, state, known, codec="planes")
                yield from restoring.restoring(bench, name, place, state, known)
                place = store.place("plain")
                yield from saving.saves(bench, name, place, state, known, codec="none")
                yield from restoring.plainly(bench, name, place, state, known)
    buffer.release()
    arena.close()


def _heading(about: dict) -> str:
    where = about["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in where["packages"].items())
    return (
        f"`{about['command']}`\n\n"
        f"{about['date']}, commit {where['commit']}; {where['cpu']}, {where['cores']} cores, "
        f"{where['memory_bytes'] / 1e9:.0f} GB, Linux {where['kernel']}; Python {where['python']}, {packages}. "
        f"Other processes took {about['foreign_cores']:.2f} cores meanwhile."
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.stages", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", type=float, default=1.0, metavar="GB", help="of the state")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="timed runs of every stage")
    parser.add_argument("--folder", type=Path, default=_MEMORY, help="scratch; the stages named tmpfs mean this folder")
    parser.add_argument("--store", choices=[name for name in NAMES if name != "tmpfs"], help="another store to put to")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON a stage")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
