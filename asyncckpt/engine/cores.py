"""Who wants this host's cores, at this moment."""

from pathlib import Path


def runnable_threads() -> int:
    """How many threads of this host run or want to, the asking one included. `OSError` where the kernel does not say."""
    return int(Path("/proc/loadavg").read_text().split()[3].partition("/")[0])
