"""The name under which `ps` and `top` show a process of the service.

Written over its own command line, as PostgreSQL and nginx do it: `asyncckpt: run-42, 1 save in flight`. Without /proc the process
keeps the name that it was started with.
"""

import contextlib
import ctypes
import os
from pathlib import Path, PurePosixPath

from asyncckpt.store.opening import parse_url

_PR_SET_NAME = 15
_COMMAND = b"asyncckpt"
_NAME_LETTERS = 60
_libc = ctypes.CDLL(None)


def run_name(url: str) -> str:
    """What people call a run: the last part of its URL."""
    location = parse_url(url)
    name = PurePosixPath(location.prefix or location.place).name or location.place
    return "".join(letter for letter in name if letter.isprintable())[:_NAME_LETTERS]


def service_title(run: str, *, in_flight: int, idle: bool, alone: bool) -> str:
    """What a service does, for people: a run that begins on this node wants to know who holds its memory."""
    doing = "idle" if idle else "cleaning up"
    if in_flight:
        doing = f"{in_flight} save{'s' if in_flight > 1 else ''} in flight"
    return f"asyncckpt: {run}, {doing}" + (", left alone" if alone else "")


class Title:
    """The name of this process and, until they give themselves another, of those that it forks."""

    def __init__(self) -> None:
        self._shown = ""
        self._start, self._room_bytes = _command_line()
        _libc.prctl(_PR_SET_NAME, _COMMAND)

    def show(self, text: str) -> None:
        """Take this name, cut to the length of the command line. Costs nothing if it is the name already."""
        if text == self._shown or not self._room_bytes:
            return
        self._shown = text
        data = text.encode(errors="replace")[: self._room_bytes - 1].ljust(self._room_bytes, b"\0")
        with contextlib.suppress(OSError):
            memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)
            try:
                os.pwrite(memory, data, self._start)
            finally:
                os.close(memory)


def _command_line() -> tuple[int, int]:
    """Where the kernel keeps the arguments of this process, and how many bytes; (0, 0) where it does not say (proc(5), fields 48 and 49)."""
    with contextlib.suppress(OSError, ValueError, IndexError):
        fields = Path("/proc/self/stat").read_bytes().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])
        if start and end - start == len(Path("/proc/self/cmdline").read_bytes()):
            return start, end - start
    return 0, 0
