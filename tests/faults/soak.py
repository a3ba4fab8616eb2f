"""`python -m tests.faults.soak --minutes 30`: real trainings before a real S3 server, for long, in bad weather.

One training is killed again and again: trainer, service, worker or all of them. A second one, the steady one, is never killed, so its
memory and descriptors can be watched. Both send everything through a proxy that spoils a part of all requests, and the store goes away
for a while. At the end nothing that was acknowledged may be lost, and nothing may be left.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

import asyncckpt
from asyncckpt import Run, S3Options
from asyncckpt.errors import CheckpointError
from asyncckpt.store.opening import open_store
from tests.faults.fates import Weather
from tests.faults.http import Proxy
from tests.faults.places import s3_server
from tests.processes import alive, descendants, kill, services
from tests.training import Training, fingerprint

LOOK_S = 0.25
SAMPLE_S = 5.0
STEADY_MINUTES = 5.0  # before that caches and pools still fill
AWAY_AT, WARM_UP = 0.1, 0.5  # of the soak: when the store goes away, and from when on memory is looked at: behind that
END_S = 90.0
VICTIMS = ("trainer", "trainer", "service", "worker", "all")


@dataclass(frozen=True, slots=True)
class Plan:
    """What the soak does. `outage_s`: how long the store is away, once, near the beginning; `kill_every_s`: one victim each."""

    minutes: float
    rate: float
    kill_every_s: float
    outage_s: float
    deadline_s: float
    seed: int


@dataclass
class Found:
    """`figures`: for the table. `violations`: what must not have happened."""

    figures: dict[str, Any] = field(default_factory=dict)
    violations: list[str] = field(default_factory=list)


class Line:
    """A training at one URL, started again whenever it ended; `log` has what it told, over all its lives."""

    def __init__(
        self, name: str, bucket: str, folder: Path, *, proxy_url: str, endpoint: str, deadline_s: float
    ) -> None:
        self.name = name
        self.url = f"s3://{bucket}/{name}"
        self.direct = S3Options(endpoint_url=endpoint)
        self.log = folder / f"{name}.jsonl"
        self._command = [sys.executable, "-m", "tests.faults.soak_trainer", self.url, proxy_url, str(self.log)]
        self._command.append(str(deadline_s))
        self._output = (folder / f"{name}.out").open("wb")
        self.lives = 0
        self.seen: set[int] = set()
        self.start()

    def start(self) -> None:
        self.process = subprocess.Popen(self._command, stdout=self._output, stderr=self._output, cwd=_ROOT)
        self.lives += 1

    def look(self) -> None:
        """Note who belongs to it."""
        self.seen |= {self.process.pid, *descendants(self.process.pid)}

    def strike(self, victim: str) -> None:
        """Kill the trainer, its service, a worker, or all."""
        pid = self.process.pid
        found = services(pid)
        workers = [child for service in found for child in descendants(service)]
        whom = {"trainer": [pid], "service": found, "worker": workers, "all": [*workers, *found, pid]}[victim]
        for one in whom:
            kill(one)
        if pid in whom:
            self.process.wait()
            self.start()

    def end(self) -> bool:
        """SIGTERM, as a scheduler would. Whether it ended by itself, and everything that it started with it."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_S)
        until_s = time.monotonic() + END_S
        while any(map(alive, self.seen)) and time.monotonic() < until_s:
            time.sleep(LOOK_S)
        self._output.close()
        return not self.left()

    def left(self) -> list[int]:
        return [pid for pid in self.seen if alive(pid)]

    def facts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log.read_text().splitlines()] if self.log.exists() else []


_ROOT = Path(__file__).parent.parent.parent


def soak(plan: Plan, folder: Path) -> Found:
    """Let both trainings run, and hold them and the store against what they told."""
    endpoint, bucket = s3_server()
    found = Found()
    with contextlib.closing(Proxy(endpoint, bucket, Weather(plan.rate, plan.seed))) as proxy:
        proxy.ask("begin", 1, 0)
        of_all = {"proxy_url": proxy.url, "endpoint": endpoint, "deadline_s": plan.deadline_s}
        lines = [Line(name, bucket, folder, **of_all) for name in ("killed", "steady")]
        try:
            samples = _storm(plan, lines, proxy)
            for line in lines:
                if not line.end():
                    found.violations.append(f"left: processes {line.left()} of the {line.name} training")
        finally:
            for line in lines:
                for pid in line.left():
                    kill(pid)
        proxy.ask("deliver")
        facts = proxy.ask("facts")
        kinds = Counter(fault.rpartition(" ")[2] for fault in facts["fired"])
        found.figures["requests"], found.figures["spoilt"] = len(facts["points"]), sum(kinds.values())
        found.figures["of these"] = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
    for line in lines:
        _judge(line, found)
    if plan.minutes >= STEADY_MINUTES:
        _slope(samples, found)
    return found


def _storm(plan: Plan, lines: list[Line], proxy: Proxy) -> list[tuple[float, int, int, int]]:
    """The time itself. Samples of the steady training: seconds, bytes of memory, descriptors, threads."""
    killed, steady = lines
    dice = random.Random(plan.seed)
    started_s = time.monotonic()
    whole_s = plan.minutes * 60
    away_s = min(AWAY_AT * whole_s, whole_s - plan.outage_s)
    next_kill_s, next_sample_s, away = plan.kill_every_s, 0.0, False
    samples = []
    while (now_s := time.monotonic() - started_s) < whole_s:
        time.sleep(LOOK_S)
        for line in lines:
            line.look()
        if now_s >= next_kill_s:
            next_kill_s += plan.kill_every_s
            killed.strike(dice.choice(VICTIMS))
        if plan.outage_s and away != (away_s <= now_s < away_s + plan.outage_s):
            away = not away
            proxy.ask("away", away)
        if now_s >= next_sample_s:
            next_sample_s += SAMPLE_S
            samples.append((now_s, *_size_of(steady.process.pid)))
    proxy.ask("away", False)
    return samples


def _size_of(pid: int) -> tuple[int, int, int]:
    """Memory of its own (not shared, not a file's) of a trainer, its service and its workers; descriptors; threads."""
    size = files = threads = 0
    for one in (pid, *descendants(pid)):
        with contextlib.suppress(OSError):
            text = Path(f"/proc/{one}/smaps_rollup").read_text()
            size += 1024 * int(next(line.split()[1] for line in text.splitlines() if line.startswith("Pss_Anon:")))
            files += len(os.listdir(f"/proc/{one}/fd"))
            threads += len(os.listdir(f"/proc/{one}/task"))
    return size, files, threads


def _slope(samples: list[tuple[float, int, int, int]], found: Found) -> None:
    late = [sample for sample in samples if sample[0] >= WARM_UP * samples[-1][0]]
    minutes: dict[int, list[int]] = {}
    for sample in late:
        minutes.setdefault(int(sample[0] // 60), []).append(sample[1])
    size = np.array([min(sizes) for sizes in minutes.values()], float) / 2**20  # between two saves
    found.figures["memory of the steady training, MiB"] = f"{size[0]:.2f} to {size[-1]:.2f}"
    found.figures["its slope, MiB an hour"] = f"{np.polyfit(list(minutes), size, 1)[0] * 60:.2f}"
    third = max(1, len(late) // 3)
    for number, what in ((2, "descriptors"), (3, "threads")):
        first, last = ([sample[number] for sample in part] for part in (late[:third], late[-third:]))
        found.figures[what] = f"{min(first)} to {max(first)}, at last {min(last)} to {max(last)}"
        if min(last) > max(first):
            found.violations.append(f"left: {what} of the steady training grow: {found.figures[what]}")


def _judge(line: Line, found: Found) -> None:
    """What it told against itself, and against the store."""
    attempted: dict[int, set[str]] = {}
    newest, counts, errors = 0, Counter[str](), Counter[str]()
    for fact in line.facts():
        name, value = next(iter(fact.items()))
        counts[name] += 1
        if name == "saving":
            attempted.setdefault(value, set()).add(fact["content"])
        elif name == "committed":
            newest = max(newest, value)
        elif name == "failed":
            errors[fact["error"].split(":")[0 if not fact["error"].startswith("restore") else 1].strip()] += 1
        elif name == "restored":
            if value < newest:
                found.violations.append(f"lost: {line.name} restored {value} where {newest} was acknowledged")
            elif value and fact["content"] not in attempted.get(value, ()):
                found.violations.append(f"wrong: {line.name} restored another step {value} than was saved")
    found.figures[f"{line.name}: lives, saves, committed"] = f"{line.lives}, {counts['saving']}, {counts['committed']}"
    found.figures[f"{line.name}: failed, with a typed error"] = ", ".join(f"{k} {n}" for k, n in errors.items()) or "0"
    output = line.log.with_suffix(".out").read_text(errors="replace")
    if "Traceback" in output:
        found.violations.append(f"untyped: the {line.name} training ended with\n{output[-2000:]}")
    _judge_store(line, newest, attempted, found)


def _judge_store(line: Line, newest: int, attempted: dict[int, set[str]], found: Found) -> None:
    with Run(line.url, store=line.direct) as run:
        collected = run.collect_garbage(timedelta(0))
        there = [checkpoint.step for checkpoint in run.checkpoints()]
    found.figures[f"{line.name}: collected at the end"] = (
        f"{len(collected.folders)} folders, {len(collected.uploads)} uploads"
    )
    if newest and newest not in there and max(there, default=0) < newest:
        found.violations.append(f"lost: step {newest} of {line.name} was acknowledged, and {there} are there")
    for step in there:
        training = Training(width=256)
        try:
            asyncckpt.restore(line.url, training.state, step=step, store=line.direct)
        except CheckpointError as error:
            found.violations.append(f"lost: step {step} of {line.name}: {error}")
            continue
        if fingerprint(training.facts()) not in attempted.get(step, ()):
            found.violations.append(f"wrong: step {step} of {line.name} is not what was saved")
    with open_store(line.url, line.direct) as store:
        left = {key.partition("/")[0] for key in (entry.key for entry in store.list()) if "/" in key}
        if len(left) > len(there):
            found.violations.append(f"left: folders {sorted(left)} where the steps {there} are")


def main() -> int:
    """0 if nothing was violated."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--rate", type=float, default=0.05, help="of all requests, how many are spoilt")
    parser.add_argument("--kill-every", type=float, default=60.0, metavar="S")
    parser.add_argument("--outage", type=float, default=600.0, metavar="S", help="how long the store is away, once")
    parser.add_argument("--deadline", type=float, default=600.0, metavar="S", help="RetryPolicy.deadline_s")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    plan = Plan(chosen.minutes, chosen.rate, chosen.kill_every, chosen.outage, chosen.deadline, chosen.seed)
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        found = soak(plan, Path(folder))
    for name, figure in found.figures.items():
        print(f"{name:40} {figure}")
    print(*found.violations or ["nothing was violated"], sep="\n")
    return bool(found.violations)


if __name__ == "__main__":
    sys.exit(main())
