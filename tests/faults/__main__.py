"""`python -m tests.faults --runs 2000`: the campaign, or one run of it again."""

import argparse
import logging
import sys
import time
import warnings

from tests.faults.campaign import SCENARIOS, VICTIMS, Table, drawn, in_parallel, run, systematic
from tests.faults.fates import FILE_FAULTS, REQUEST_FAULTS, WIRE_FAULTS, Case
from tests.faults.places import PLACES


def main() -> int:
    """0 if nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--runs", type=int, default=2000, help="how many runs of the campaign")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--seed", type=int, help="of the campaign; with --scenario, of that one run's dice")
    parser.add_argument(
        "--scenario", choices=sorted(SCENARIOS), help="one run alone, or with --all every fault at every point"
    )
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--store", choices=sorted(PLACES), default="memory")
    parser.add_argument("--fault", choices=sorted({*REQUEST_FAULTS, *WIRE_FAULTS, *FILE_FAULTS}), default="")
    parser.add_argument("--at", default="", help="the point, as a failure prints it")
    parser.add_argument("--victim", choices=VICTIMS, default="worker")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("asyncckpt").setLevel(logging.CRITICAL)
    if chosen.all:
        return many(systematic(chosen.scenario, chosen.store), chosen.jobs)
    if chosen.scenario:
        return one(Case(chosen.scenario, chosen.store, chosen.fault, chosen.at, chosen.seed, chosen.victim))
    return many(list(drawn(chosen.runs, chosen.seed or 0)), chosen.jobs)


def one(case: Case) -> int:
    verdict = run(case)
    for fault in verdict.fired:
        print(f"fault: {fault}")
    for failure in verdict.failures:
        print(f"a save or a life failed, as it may: {failure}")
    print(verdict.told() if verdict.violations else "nothing was violated")
    return bool(verdict.violations)


def many(cases: list[Case], jobs: int) -> int:
    started_s = time.monotonic()
    table, violated = Table(), 0
    for done, verdict in enumerate(in_parallel(cases, jobs), 1):
        table.add(verdict)
        if verdict.violations:
            violated += 1
            print(verdict.told(), flush=True)
        if done % 100 == 0:
            print(f"{done} of {len(cases)} runs, {violated} violated, {time.monotonic() - started_s:.0f} s", flush=True)
    print(*table.lines(), sep="\n")
    print(
        f"{len(cases)} runs in {time.monotonic() - started_s:.0f} s; {violated} violated; {table.missed} met no point"
    )
    return bool(violated)


if __name__ == "__main__":
    sys.exit(main())
