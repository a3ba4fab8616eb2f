"""An old kernel, a container's filter or a sandbox refuses what a service likes to have; saves go on, and one warning says what is missing."""

import errno
import os
import signal

import pytest

import asyncckpt
from asyncckpt import Run
from tests.processes import alive, ended_at_last, eventually
from tests.refusals import KNOWN
from tests.trainers import s3
from tests.training import assert_numbered

needs_numbers = pytest.mark.skipif(not KNOWN, reason="the numbers of system calls are known for x86_64 and aarch64")
may_mount = pytest.mark.skipif(os.geteuid() != 0, reason="only root may hide /proc")

SERVICE, INLINE = "ServiceEngine", "InlineEngine"


@needs_numbers
@pytest.mark.parametrize(
    ("refused", "engine", "says"),
    [
        (("memfd_create", errno.EPERM), INLINE, "saving on threads of this process"),
        (("socketpair", errno.EPERM), INLINE, "saving on threads of this process"),
        (("pidfd_open", errno.ENOSYS), SERVICE, "looks every second whether this process lives"),
        (("setpriority", errno.ENOSYS), SERVICE, "workers do not yield"),
    ],
)
def test_saves_go_on_without_it_and_one_warning_names_the_reason(warm, tmp_path, refused, engine, says):
    trainer = warm.start("save_where_refused", str(tmp_path), *refused, {})
    lines = trainer.report("lines")
    assert trainer.end() == 0
    assert trainer.report("engines") == [engine] * 2
    (line,) = lines
    assert says in line
    assert os.strerror(refused[1]) in line
    assert_numbered(asyncckpt.load(tmp_path), 4)


@may_mount
def test_saves_go_on_without_proc_and_one_warning_says_so(warm, tmp_path):
    trainer = warm.start("save_where_refused", str(tmp_path), "/proc", 0, {"workers": 2})
    (line,) = trainer.report("lines")
    assert trainer.end() == 0
    assert trainer.report("engines") == [SERVICE] * 2
    assert "no /proc" in line
    assert_numbered(asyncckpt.load(tmp_path), 4)


@needs_numbers
def test_without_a_pidfd_a_killed_trainer_is_still_noticed_though_its_forks_hold_the_socket(warm, proxy, s3_url):
    proxy.down = True
    trainer = warm.start("save_with_loader_workers_where_refused", s3_url, proxy.url, "pidfd_open", errno.ENOSYS)
    trainer.report("saved")
    service, loaders = trainer.report("service"), trainer.report("loaders")
    with ended_at_last(service, *loaders):
        for loader in loaders:
            os.kill(loader, signal.SIGSTOP)  # they would end with their parent
        trainer.kill()
        assert trainer.end() == -signal.SIGKILL
        proxy.down = False
        with Run(s3_url, store=s3(proxy.url)) as run:
            eventually(lambda: run.latest() is not None, "step 1 is committed")
        eventually(lambda: not alive(service), "the service ends")
        assert all(alive(loader) for loader in loaders)
    assert_numbered(asyncckpt.load(s3_url, step=1, store=s3(proxy.url)), 1)
