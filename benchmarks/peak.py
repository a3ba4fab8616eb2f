"""The most memory that a process tree had for a while, seen from outside. Imports no torch: it is started for each measurement."""

import contextlib
import os
import select
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Self

from benchmarks.measure import memory, tree


class Peak:
    """Most memory of this process tree while `sampling()`, looked at every 50 ms by a process of its own, `pid`."""

    most_bytes = 0

    def __init__(self, apart: Iterable[int] = ()) -> None:
        self._apart = list(apart)

    def __enter__(self) -> Self:
        words = [str(pid) for pid in (os.getpid(), *self._apart)]
        command = [sys.executable, "-m", "benchmarks.peak", *words]
        cwd = Path(__file__).parent.parent
        self._sampler = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self._sampler.pid
        return self

    def __exit__(self, *_: object) -> None:
        answer, _ = self._sampler.communicate()  # closes its stdin
        self.most_bytes = int(answer)

    @contextlib.contextmanager
    def sampling(self) -> Iterator[None]:
        """From its first look to its last."""
        self._ask("on")
        try:
            yield
        finally:
            self._ask("off")

    def _ask(self, word: str) -> None:
        assert self._sampler.stdin is not None
        assert self._sampler.stdout is not None
        self._sampler.stdin.write(f"{word}\n")
        self._sampler.stdin.flush()
        self._sampler.stdout.readline()


def _sample(root: int, apart: list[int]) -> None:
    most, on = 0, False
    while True:
        if on:
            most = max(most, memory(tree(root, apart)).total_bytes)
        if select.select([sys.stdin], [], [], 0.05 if on else None)[0]:
            word = sys.stdin.readline()
            if not word:
                break
            on = word == "on\n"
            print(word, end="", flush=True)
    print(most)


if __name__ == "__main__":
    _sample(int(sys.argv[1]), [os.getpid(), *map(int, sys.argv[2:])])
