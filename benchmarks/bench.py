"""Checkpoints side by side: one state, one store, one run.

    python -m benchmarks.bench                                    # the quick set, under six minutes on two cores
    python -m benchmarks.bench --full --json results.jsonl        # everything; keep the figures
    python -m benchmarks.bench python --loop torch --rounds 5     # one scenario, another main thread
    python -m benchmarks.bench idle --peers asyncckpt,dcp-process,torch.save --store disk
    python -m benchmarks.bench python --codec planes --workers 1  # asyncckpt, set otherwise
    python -m benchmarks.bench --size 0.1 --rounds 1              # a tenth of the bytes: does it run at all?
    python -m benchmarks.bench --assert                           # fail when a goal is missed or not judged

Every save is restored into a second state and compared bit for bit. Run from the root of the repository, on a machine that does
nothing else: the row foreign_cores says how many cores other processes took meanwhile.
"""

import argparse
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks import loops, peers, results, scenarios, stores
from benchmarks.arguments import count, file_to_append_to, folder, names_among, positive
from benchmarks.reports import lines, overview
from benchmarks.trained import trained

_ROOT = Path(__file__).parent.parent
_MEMORY = Path("/dev/shm")
_LEFT_OUT = "ASYNCCKPT_BENCH_LEFT_OUT"  # to the program that begins again


def main() -> int:
    args = _arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that folders and servers go
    if args.list:
        print(_listed())
        return 0
    if len(args.scenarios) != 1:
        return _each_alone(args, args.scenarios or _suited(args))
    choices = scenarios.Choices(
        folder=args.folder or (_MEMORY if _MEMORY.is_dir() else Path(tempfile.gettempdir())),
        size=args.size,
        rounds=args.rounds,
        peers=args.peers,
        loop=args.loop,
        store=args.store,
        workers=args.workers,
        codec=args.codec,
        full=args.full,
        warm=args.warm,
        left_out=tuple(scenarios.LeftOut(*one) for one in json.loads(os.environ.pop(_LEFT_OUT, "[]"))),
    )
    origin = results.Origin("benchmarks.bench", trained().source)
    try:
        found = scenarios.run(args.scenarios[0], choices)
    except scenarios.SystemFailedError as error:
        _begin_again([*choices.left_out, error.left_out], error.folder)
    print(results.table(found) + "\n", flush=True)
    if args.json:
        results.append(args.json, found, origin)
    missed = [goal for result in found for goal in result.goals if not goal.met]
    broken = [result for result in found if result.error and result.peer.startswith("asyncckpt")]
    return 1 if broken or (args.assert_goals and missed) else 0


def _begin_again(left_out: list[scenarios.LeftOut], folder: Path | None) -> NoReturn:
    """This command in a new program, in the same process: what a system left behind (20,000 descriptors) is gone."""
    os.environ[_LEFT_OUT] = json.dumps([dataclasses.astuple(one) for one in left_out])
    sys.stdout.flush()
    os.closerange(3, os.sysconf("SC_OPEN_MAX"))
    if folder is not None:
        shutil.rmtree(folder, ignore_errors=True)
    os.execv(sys.executable, [sys.executable, "-m", "benchmarks.bench", *sys.argv[1:]])


def _suited(args: argparse.Namespace) -> list[str]:
    """The scenarios of the set that can do what the options ask for."""
    names = scenarios.names(full=args.full)
    left_out = {name: why for name in names if (why := _refusal(args, name))}
    for name, why in left_out.items():
        print(f"{name} is left out: {why}", file=sys.stderr)
    return [name for name in names if name not in left_out]


def _refusal(args: argparse.Namespace, name: str, *, every: bool = False) -> str | None:
    saver = _sets_the_saver(args)
    return scenarios.refusal(name, loop=args.loop, store=args.store, saver=saver, asked=args.peers, every=every)


def _sets_the_saver(args: argparse.Namespace) -> bool:
    return args.workers is not None or args.codec is not None


def _each_alone(args: argparse.Namespace, names: Sequence[str]) -> int:
    """Every scenario in a process of its own: none measures what another left behind."""
    trained()  # before the first, so that it is not trained under a scenario's heading
    options = _options_alone(sys.argv[1:], names)
    options += ["--folder", str(args.folder.absolute())] if args.folder else []  # children run in another folder
    codes = []
    began = time.monotonic()
    with tempfile.NamedTemporaryFile("r", suffix=".jsonl") as found:
        for name in names:
            print(f"{time.monotonic() - began:5.0f} s  {name}", file=sys.stderr, flush=True)
            known = [peer for peer in args.peers or () if peer in scenarios.peers_of(name)]
            own = ["--peers", ",".join(known)] if known else []
            command = [sys.executable, "-m", "benchmarks.bench", *options, *own, "--json", found.name, "--", name]
            codes.append(_run(command))
            if args.json:
                with args.json.open("a") as kept:
                    kept.write(found.read())  # from where the last one ended
        print(f"{time.monotonic() - began:5.0f} s  all", file=sys.stderr, flush=True)
        if whole := overview.table(lines.read([Path(found.name)])):
            print(whole, flush=True)
    return int(any(codes))  # one that was killed has a negative one


def _options_alone(words: list[str], names: Sequence[str]) -> list[str]:
    """Without the scenarios, of which some are named like a store or a loop, and without what each is given anew."""
    anew, kept = ("--json", "--folder", "--peers"), []
    values = {"--rounds", "--size", "--loop", "--store", "--workers", "--codec"}
    for before, word in zip(["", *words], words, strict=False):
        given_anew = before in anew or word.split("=")[0] in anew
        if before in values or not (given_anew or word in (*names, "--")):
            kept.append(word)
    return kept


def _run(command: list[str]) -> int:
    child = subprocess.Popen(command, cwd=_ROOT)
    try:
        return child.wait()
    finally:
        child.terminate()  # if we are told to end, it is told too, and cleans up
        child.wait()


def _listed() -> str:
    lines = [f"  {s.name:17} {'quick' if s.quick else 'full ':5}  {s.about}" for s in scenarios.SCENARIOS.values()]
    return "\n".join(["scenarios:", *lines, f"peers: {', '.join(peers.NAMES)}", f"stores: {', '.join(stores.NAMES)}"])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.bench",
        description=f"{__doc__}\n{_listed()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # `_options_alone` knows whole words
    )
    parser.add_argument("scenarios", nargs="*", metavar="scenario", help="none: the quick set, or all with --full")
    parser.add_argument("--full", action="store_true", help="all scenarios, more systems, more rounds")
    parser.add_argument("--list", action="store_true", help="scenarios, peers and stores")
    parser.add_argument("--size", type=positive, default=1.0, metavar="FACTOR", help="on the bytes of every state")
    parser.add_argument("--rounds", type=count, metavar="N", help="rounds, or saves, of every system")
    parser.add_argument(
        "--peers", type=names_among({*peers.NAMES, *scenarios.CODECS}), metavar="A,B", help="systems, in their order"
    )
    parser.add_argument("--loop", choices=list(loops.LOOPS), help="the main thread's work")
    parser.add_argument("--store", choices=stores.NAMES, help="where everybody saves")
    parser.add_argument("--workers", type=count, metavar="N", help="of the system asyncckpt")
    parser.add_argument("--codec", choices=("auto", "none", "planes", "zstd"), help="of the system asyncckpt")
    parser.add_argument("--folder", type=folder, help="scratch space for stores in memory; default: /dev/shm")
    parser.add_argument(
        "--warm", action=argparse.BooleanOptionalAction, default=True, help="touch as much memory before each round"
    )
    parser.add_argument("--json", type=file_to_append_to, metavar="FILE", help="append one line of JSON a result")
    parser.add_argument(
        "--assert",
        action="store_true",
        dest="assert_goals",
        help="exit with 1 when a goal is missed, or could not be judged",
    )
    args = parser.parse_args()
    if unknown := set(args.scenarios) - set(scenarios.NAMES):
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    for name in args.scenarios:
        if why := _refusal(args, name, every=True):
            parser.error(f"scenario {name}: {why}")
    if args.assert_goals and (args.size != 1 or args.loop or args.store or _sets_the_saver(args)):
        parser.error(
            "--assert: the goals stand for the scenarios as they are, without --size, --loop, --store, --workers, --codec"
        )
    return args


if __name__ == "__main__":
    sys.exit(main())
