"""Faults of file operations: the calls of `os` under a local store are counted, fail, or kill the process they are made in.

`install` changes the whole process, so it is for a forked child, or for a service that is started with `sitecustomize` of
the folder `inside`.
"""

import errno
import fcntl
import json
import os
import re
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from tests.faults.fates import KILLS, Case, Dice, Names, Point

OPERATIONS = {
    "open": os.open,
    "mkdir": os.mkdir,
    "chmod": os.chmod,
    "pwritev": os.pwritev,
    "pwrite": os.pwrite,
    "fsync": os.fsync,
    "fdatasync": os.fdatasync,
    "link": os.link,
    "rename": os.rename,
    "replace": os.replace,
    "unlink": os.unlink,
    "remove": os.remove,
    "rmdir": os.rmdir,
}
_FILLING = frozenset({"open", "mkdir", "pwritev", "pwrite", "fsync", "fdatasync", "link"})
_ENVIRONMENT = "ASYNCCKPT_TEST_FAULTS"


class Files:
    """The file operations below `root` in this process. `tell`: hears every point and every fault that met one."""

    def __init__(
        self, root: str, case: Case, life: int, tell: Any, *, once: str = "", victims: dict[str, int] | None = None
    ) -> None:
        self._root = str(Path(root).resolve())
        self._case, self._life, self._tell = case, life, tell
        self._dice, self._names = Dice(case), Names()
        self._once = once
        self._victims = victims or {}
        self._full = False
        self._lock = threading.RLock()

    def install(self) -> None:
        """From now on, until the process ends."""
        for name, real in OPERATIONS.items():
            setattr(os, name, self._wrapped(name, real))
        fcntl.flock = self._wrapped("flock", fcntl.flock)

    def _wrapped(self, name, real):
        def call(target, *arguments, **options):
            inside = self._path(target)
            if inside is None or (name == "open" and not arguments[0] & os.O_CREAT):
                return real(target, *arguments, **options)
            with self._lock:
                point = self._names.point(self._life, name, inside)
                self._tell(point=str(point))
                if self._full and name in _FILLING:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), inside)
                fault = self._dice.fault(point)
                if not fault or not self._first(fault):
                    return real(target, *arguments, **options)
                self._tell(fired=[str(point), fault])
                return self._meet(fault, inside, lambda: real(target, *arguments, **options))

        return call

    def _path(self, target) -> str | None:
        """The path below the root, or None. Descriptors are looked up."""
        if isinstance(target, int):
            try:
                target = os.readlink(f"/proc/self/fd/{target}")
            except OSError:
                return None
        path = os.fspath(target)
        if not isinstance(path, str) or not path.startswith(self._root):
            return None
        return re.sub(r"\.asyncckpt-unfinished\b", "unfinished", path[len(self._root) :].strip("/")) or "."

    def _first(self, fault: str) -> bool:
        """A worker that follows a killed one must not be killed at the same point for ever."""
        if not self._once or fault not in KILLS:
            return True
        try:
            os.close(OPERATIONS["open"](self._once, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        return True

    def _meet(self, fault, path, call):
        if fault == "kill-before":
            self._kill()
        if fault == "kill-after":
            call()
            self._kill()
        if fault == "full":
            self._full = True
        number = errno.EIO if fault == "eio" else errno.ENOSPC
        raise OSError(number, os.strerror(number), path)

    def _kill(self) -> None:
        victims = {**self._victims, "worker": os.getpid(), "service": os.getppid()}
        chosen = ["trainer", "service", "worker"] if self._case.victim == "all" else [self._case.victim]
        for victim in chosen:
            os.kill(victims[victim], signal.SIGKILL)
        if "worker" not in chosen:
            return
        while True:
            signal.pause()  # the signal is on its way


def environment(root: str, case: Case, life: int, scratch: Path, trainer: int) -> dict[str, str]:
    """What a service must find in its environment, for its workers to meet the case's faults."""
    inside = Path(__file__).parent / "inside"
    said = {"root": root, "case": case.to_json(), "life": life, "scratch": str(scratch), "trainer": trainer}
    return {_ENVIRONMENT: json.dumps(said), "PYTHONPATH": str(inside)}


def install_from_environment() -> None:
    """In a service, before anything else of it runs; its forked workers inherit it. The service itself touches no file."""
    said = json.loads(os.environ[_ENVIRONMENT])
    log = os.open(f"{said['scratch']}/points", os.O_CREAT | os.O_WRONLY | os.O_APPEND)

    def tell(**fact: Any) -> None:
        fd = os.open(f"{said['scratch']}/points", os.O_WRONLY | os.O_APPEND)  # workers close what they inherit
        os.write(fd, (json.dumps({**fact, "service": os.getppid()}) + "\n").encode())
        os.close(fd)

    os.close(log)
    once = f"{said['scratch']}/killed"
    victims = {"trainer": said["trainer"]}
    Files(said["root"], Case(**said["case"]), said["life"], tell, once=once, victims=victims).install()


def points_in(lines: list[dict[str, Any]]) -> list[Point]:
    """The points that were told of."""
    found = []
    for line in lines:
        if "point" in line:
            life, operation, rest = line["point"].split(":", 2)
            key, _, count = rest.rpartition(":")
            found.append(Point(int(life), operation, key, int(count)))
    return found


if sys.platform != "linux":  # /proc
    raise ImportError("file faults need Linux")
