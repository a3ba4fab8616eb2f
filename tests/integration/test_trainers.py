"""Trainers end in every way there is; what was handed over is committed, and nothing of ours stays behind."""

import os
import signal

import pytest

import asyncckpt
from asyncckpt import Run
from tests.processes import alive, children, ended_at_last, eventually, kill
from tests.trainers import s3
from tests.training import assert_numbered


def committed(url, endpoint, step=1):
    store = s3(endpoint)
    with Run(url, store=store) as run:
        eventually(lambda: run.latest() is not None and run.latest().step == step, f"step {step} is committed")
    return asyncckpt.load(url, step=step, store=store)


def gone(*pids):
    eventually(lambda: not any(alive(pid) for pid in pids), f"{pids} are gone")


def test_a_trainer_killed_after_it_handed_over_is_committed_with_live_loader_workers(warm, proxy, s3_url):
    proxy.down = True
    trainer = warm.start("save_with_loader_workers", s3_url, proxy.url)
    trainer.report("saved")
    service, loaders = trainer.report("service"), trainer.report("loaders")
    with ended_at_last(service, *loaders):
        (worker,) = eventually(lambda: children(service), "a worker works")[:1]
        assert all(alive(loader) for loader in loaders)
        trainer.kill()
        assert trainer.end() == -signal.SIGKILL
        assert alive(service), "the service finishes what it was given"
        proxy.down = False
        assert_numbered(committed(s3_url, proxy.url), 1)
        gone(service, worker)
        gone(*loaders)


def test_a_trainer_killed_the_moment_save_returned_is_committed(warm, tmp_path):
    """Its service is not even up: the trainer is dead and reaped when it reads the first message."""
    for number in range(3):
        url = str(tmp_path / str(number))
        trainer = warm.start("save_and_die", url, None)
        assert trainer.end() == -signal.SIGKILL
        assert_numbered(committed(url, None), 1)
        gone(trainer.report("service"))


def test_a_worker_killed_after_its_trainer_is_replaced_too(warm, proxy, s3_url):
    proxy.down = True
    trainer = warm.start("save_and_wait", s3_url, proxy.url)
    trainer.report("saved")
    service = trainer.report("service")
    with ended_at_last(service):
        (worker, *_) = eventually(lambda: children(service), "a worker works")
        trainer.kill()
        trainer.end()
        kill(worker)
        eventually(lambda: children(service) and worker not in children(service), "another worker works")
        proxy.down = False
        assert_numbered(committed(s3_url, proxy.url), 1)
        gone(service)


@pytest.mark.parametrize(
    ("way", "status"),
    [("exit_normally", 0), ("exit_by_sys_exit", 3), ("exit_by_exception", 1), ("exit_at_once", 7)],
)
def test_however_a_script_ends_it_ends_at_once_and_its_save_is_committed(warm, proxy, s3_url, way, status):
    proxy.down = True
    trainer = warm.start(way, s3_url, proxy.url)
    service = trainer.report("service")
    with ended_at_last(service):
        assert trainer.end(patience_s=10) == status, "it ends while the store is still down"
        assert alive(service)
        proxy.down = False
        loaded = committed(s3_url, proxy.url)
        assert_numbered({"weights": loaded["weights"], "step": loaded["step"]}, 1)
        gone(service)


def test_ctrl_c_ends_the_trainer_and_leaves_the_service_finishing(warm, proxy, s3_url):
    proxy.down = True
    trainer = warm.start("train_until_interrupted", s3_url, proxy.url)
    trainer.report("saved")
    service = trainer.report("service")
    with ended_at_last(service):
        worker = eventually(lambda: children(service), "a worker works")[0]
        os.killpg(trainer.pid, signal.SIGINT)  # as a terminal does: to the whole foreground group
        assert trainer.end(patience_s=10) in (1, -signal.SIGINT)
        assert alive(service)
        assert alive(worker)
        proxy.down = False
        assert_numbered(committed(s3_url, proxy.url), 1)
        gone(service)


def test_a_saver_in_a_forked_child_says_so_holds_nothing_and_the_parent_goes_on(warm, tmp_path):
    trainer = warm.start("fork_with_a_saver", str(tmp_path), None)
    assert trainer.report("forked_status") == 0
    assert trainer.report("process_status") == 0
    assert trainer.report("went_on")
    assert trainer.end() == 0
    assert_numbered(asyncckpt.load(tmp_path), 2)


def test_forks_at_any_moment_of_a_save_neither_hang_nor_harm_it(warm, tmp_path):
    trainer = warm.start("fork_during_saves", str(tmp_path), None)
    assert trainer.report("went_on")
    assert trainer.end() == 0
    assert [line["child"] for line in trainer.lines if "child" in line] == [0] * 10
    with Run(tmp_path) as run:
        assert [checkpoint.step for checkpoint in run.checkpoints()] == list(range(1, 11))


def test_the_main_loop_keeps_its_core_beside_a_worker(warm, tmp_path):
    """Nice must count: the service is in the trainer's session, and so in its scheduling group.

    Measured in CPU seconds of one core that both are bound to, so that whatever else this host does takes no side. In a group of its own
    a worker gets half of it.
    """
    trainer = warm.start("share_a_core", str(tmp_path))
    ours_s, theirs_s = trainer.report("cpu_s", 110.0)
    assert trainer.end() == 0
    assert theirs_s > 0.02, "the save was too short to be measured"
    kept = ours_s / (ours_s + theirs_s)
    assert kept >= 0.85, f"the main loop kept {kept:.2f} of its core: {ours_s:.2f} s, its workers {theirs_s:.2f} s"
