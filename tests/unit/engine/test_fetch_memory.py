"""What a fetch costs in memory, by the kernel's account: while it runs, and afterwards."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from asyncckpt.engine.fetch import fetch
from asyncckpt.engine.ranges import REQUEST_BYTES, plan_fetch
from asyncckpt.format.plan import BLOCK_BYTES
from tests.unit.engine.test_fetch import CODECS, written


@pytest.mark.parametrize("codec", CODECS)
def test_memory_beside_the_target_is_a_few_blocks(codec):
    state = {f"t{n}": torch.randn(2_000_000) for n in range(8)}
    store, expected, index = written(state, codec=codec)
    target = memoryview(bytearray(plan_fetch(index, expected).target_bytes))
    before = resident_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM begins anew
    fetch(store, index, expected, threads=2, into=lambda _: target)
    assert resident_bytes("VmHWM") - before < 2 * (REQUEST_BYTES + 3 * BLOCK_BYTES)


@pytest.mark.parametrize("codec", ["zstd", "planes"])
def test_what_the_threads_used_goes_back_to_the_kernel(codec):
    program = """if True:
        import sys

        import torch
        from asyncckpt.engine.fetch import fetch
        from tests.unit.engine.test_fetch import written
        from tests.unit.engine.test_fetch_memory import resident_bytes

        store, names, index = written({f"t{n}": torch.randn(1_000_000) for n in range(16)}, codec=sys.argv[1])
        fetch(store, index, names, threads=1)
        before = resident_bytes("RssAnon")
        for _ in range(4):
            fetch(store, index, names, threads=8)
        print(resident_bytes("RssAnon") - before)
        """
    command = [sys.executable, "-c", program, codec]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 16 * 2**20


def resident_bytes(field: str) -> int:
    """A row of the kernel's account of this process: `VmRSS`, `VmHWM` (the peak), `RssAnon`."""
    rows = Path("/proc/self/status").read_text().splitlines()
    return next(int(row.split()[1]) * 1024 for row in rows if row.startswith(f"{field}:"))
