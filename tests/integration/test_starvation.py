"""Workers yield to everybody; on a machine whose cores are all busy they must not yield for ever."""

import faulthandler
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import asyncckpt
from asyncckpt import Saver, events
from asyncckpt.engine.seat import STARVED_NICE
from tests.processes import children, eventually, services
from tests.trainers import TunedSaver

MOST_SAVES = 10


@pytest.fixture
def busy_cores():
    """Every core computes for somebody else."""
    spin = "while True: pass"
    strangers = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(os.cpu_count() or 1)]
    yield
    for stranger in strangers:
        stranger.kill()
        stranger.wait()


def test_a_worker_that_gets_no_core_is_followed_by_one_that_yields_less(tmp_path, busy_cores):
    faulthandler.cancel_dump_traceback_later()  # what a starved worker has begun may take longer than a test may hang
    seen = []
    state = {"model": {str(at): torch.randn(2_000_000) for at in range(6)}}  # 48 MB, a tenth of a second alone
    with TunedSaver(tmp_path, codec="planes", hooks=[seen.append], engine_options={"starved_s": 0.5}) as saver:
        for step in range(1, MOST_SAVES + 1):  # now and then a worker is lucky
            saver.save(step, state).result(500)
            if replaced := [event for event in seen if isinstance(event, events.WorkerReplaced)]:
                break
        (service,) = services(os.getpid())
        kept = [os.getpriority(os.PRIO_PROCESS, worker) - os.nice(0) for worker in children(service)]
    assert len(replaced) == 1
    assert "waited for a core" in replaced[0].reason
    assert kept
    assert set(kept) == {STARVED_NICE}
    loaded = asyncckpt.load(tmp_path, step=1)
    assert all(torch.equal(loaded["model"][name], tensor) for name, tensor in state["model"].items())


def test_workers_give_their_memory_back_when_a_save_has_ended_with_and_without_retention(tmp_path):
    state = {"model": {str(at): torch.randn(1_000_000) for at in range(24)}}  # 96 MB
    for keep in ([], [asyncckpt.KeepLast(2)]):
        with Saver(tmp_path / str(len(keep)), codec="planes", keep=keep) as saver:
            for step in (1, 2, 3):
                saver.save(step, state).result()
            (service,) = services(os.getpid())
            workers = children(service)
            assert workers
            eventually(
                lambda workers=workers: max(map(anonymous_bytes, workers)) < 40e6,
                "freed frames went back to the kernel",
            )


def anonymous_bytes(pid):
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:"))
