"""Real S3 servers as child processes, on loopback ports that the kernel chose."""

import re
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

ACCESS_KEY = "testing"
SECRET_KEY = "testing"
READY_S = 60.0

# Asks the kernel to end the server when its starter ends in any way (PR_SET_PDEATHSIG), then becomes the server.
_BOOTSTRAP = "import ctypes, os, sys; ctypes.CDLL(None).prctl(1, 9); os.execvp(sys.argv[1], sys.argv[1:])"


@contextmanager
def moto_server() -> Iterator[str]:
    """moto: honours `If-None-Match`, verifies no checksum. Yields the endpoint's URL."""
    with _running([_program("moto_server"), "-H", "127.0.0.1", "-p", "0"]) as url:
        yield url


@contextmanager
def rclone_server(folder: Path) -> Iterator[str]:
    """`rclone serve s3` over `folder`: a server written by others; ignores `If-None-Match`. A bucket is a subfolder."""
    arguments = ["serve", "s3", "--addr", "127.0.0.1:0", "--auth-key", f"{ACCESS_KEY},{SECRET_KEY}"]
    arguments += ["--config", "/dev/null", "--vfs-cache-mode", "off", str(folder)]
    with _running([_program("rclone"), *arguments]) as url:
        yield url


@contextmanager
def sink_server(verifies: str) -> Iterator[str]:
    """The benchmarks' own server: holds the checksums that it is told (`"crc32c,md5"`) against every body, and ignores the others."""
    arguments = ["-m", "benchmarks.stores.sink_server", "--verify", verifies, "--verify-large"]
    with _running([sys.executable, *arguments], cwd=Path(__file__).parent.parent) as url:
        yield url


def _program(name: str) -> str:
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    assert found, f"{name} is not installed: pip install -e '.[dev]'"
    return found


@contextmanager
def _running(command: list[str], cwd: Path | None = None) -> Iterator[str]:
    with tempfile.TemporaryFile("w+b") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", _BOOTSTRAP, *command],
            cwd=cwd,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
        try:
            yield _ready(process, output.fileno())
        finally:
            process.terminate()
            try:
                process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _ready(process: "subprocess.Popen[bytes]", output: int) -> str:
    """Wait until the server has printed its address and accepts connections."""
    deadline = time.monotonic() + READY_S
    while time.monotonic() < deadline:
        printed = Path(f"/proc/self/fd/{output}").read_text(errors="replace")
        assert process.poll() is None, f"the server ended at once: {printed}"
        address = re.search(r"http://127\.0\.0\.1:(\d+)", printed)
        if address:
            try:
                socket.create_connection(("127.0.0.1", int(address[1])), timeout=1).close()
            except OSError:
                pass
            else:
                return address[0]
        time.sleep(0.02)
    raise AssertionError(f"the server was not ready within {READY_S} s")
