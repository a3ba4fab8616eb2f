"""Checkpoints side by side: one state, one store, one run.

    python -m benchmarks.bench                                    # everything, under five minutes on two cores
    python -m benchmarks.bench busy --loop torch --rounds 3       # one scenario, another main thread
    python -m benchmarks.bench busy --peers asyncckpt,dcp-process,torch.save
    python -m benchmarks.bench small --folder /mnt/disk           # a real disk instead of memory; everybody syncs
    python -m benchmarks.bench --size 0.1 --rounds 2              # a tenth of the bytes: does it run at all?
    python -m benchmarks.bench --assert --json results.jsonl      # fail when a goal is missed, keep the figures

Every save is restored into a second state and compared bit for bit. Run from the root of the repository, on a machine that does nothing else:
the column foreign_cores says how many cores other processes took meanwhile.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks import loops, peers, results, scenarios
from benchmarks.states import DENSE
from benchmarks.trained import trained

_ROOT = Path(__file__).parent.parent
_MEMORY = Path("/dev/shm")
_ROOM = 8  # states that a folder must hold


def main() -> int:
    args = _arguments()
    if len(args.scenarios) != 1:
        return _each_alone(args.scenarios or scenarios.NAMES)
    found = _run(args.scenarios[0], args)
    print(results.table(found), flush=True)
    print()
    if args.json:
        results.append(args.json, found, trained().source)
    missed = [goal for result in found for goal in result.goals if not goal.met]
    broken = [result for result in found if result.error and result.peer.startswith("asyncckpt")]
    return 1 if broken or (args.assert_goals and missed) else 0


def _each_alone(names: tuple[str, ...]) -> int:
    """Every scenario in a process of its own: none measures what another left behind."""
    trained()  # before the first, so that it is not trained under a scenario's heading
    options = [word for word in sys.argv[1:] if word not in scenarios.NAMES]
    codes = [
        subprocess.run([sys.executable, "-m", "benchmarks.bench", name, *options], cwd=_ROOT, check=False).returncode
        for name in names
    ]
    return max(codes)


def _run(name: str, args: argparse.Namespace) -> list[results.Result]:
    base = args.folder or (_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir()))
    base.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(base).free < _ROOM * DENSE.raw_bytes * args.size:
        raise SystemExit(
            f"{base} has too little room for states of this size: choose another --folder, or a smaller --size"
        )
    folder = Path(tempfile.mkdtemp(prefix="asyncckpt-bench-", dir=base))
    try:
        return scenarios.run(name, scenarios.Context(folder, args.size, args.rounds, args.peers, args.loop))
    finally:
        shutil.rmtree(folder)


def _arguments() -> argparse.Namespace:
    listed = "\n".join(f"  {name:10} {scenarios.about(name)}" for name in scenarios.NAMES)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=f"{__doc__}\nscenarios:\n{listed}\n\npeers: {', '.join(peers.NAMES)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help="none: all")
    parser.add_argument("--size", type=float, default=1.0, metavar="FACTOR", help="on the bytes of every state")
    parser.add_argument("--rounds", type=int, metavar="N", help="rounds, or saves, of every system")
    parser.add_argument("--peers", type=_peers, metavar="A,B", help="systems, in their order")
    parser.add_argument("--loop", choices=list(loops.LOOPS), help="the main thread's work, for busy and small")
    parser.add_argument("--folder", type=Path, help="store below this folder; default: /dev/shm")
    parser.add_argument("--json", type=Path, metavar="FILE", help="append one line of JSON a result")
    parser.add_argument("--assert", action="store_true", dest="assert_goals", help="exit with 1 when a goal is missed")
    args = parser.parse_args()
    if unknown := set(args.scenarios) - set(scenarios.NAMES):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    args.json = args.json and args.json.absolute()
    return args


def _peers(text: str) -> tuple[str, ...]:
    names = tuple(text.split(","))
    if unknown := set(names) - set(peers.NAMES):
        raise argparse.ArgumentTypeError(f"no such peer: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())
